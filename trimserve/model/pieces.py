"""How many rows of a long prompt go through the widest part of a layer at once."""

from typing import Final

__all__ = ["MLP_ROWS"]

MLP_ROWS: Final = 4096
"""Between the products of an MLP a row is many times as wide as elsewhere, and memory for all would be wasted."""
