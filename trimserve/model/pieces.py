"""How many rows of a long prompt are worked on at once."""

from collections.abc import Iterator
from typing import Final

import torch

__all__ = ["MLP_ROWS", "PIECE_ROWS", "pieces"]

MLP_ROWS: Final = 4096
"""Between the products of an MLP a row is many times as wide as elsewhere, and memory for all would be wasted."""

PIECE_ROWS: Final = 1024
"""Between two pauses on a CPU: with them, part of a layer takes about as long as a layer of the vision encoder."""


def pieces(num_rows: int, device: torch.device) -> Iterator[slice]:
    """Cut rows so that there may be a pause between two pieces; at least one piece, and on a GPU never more.

    Args:
        num_rows: of a pass.
        device: where they are.
    """
    size = PIECE_ROWS if device.type == "cpu" else max(1, num_rows)
    for first in range(0, max(1, num_rows), size):
        yield slice(first, min(first + size, num_rows))
