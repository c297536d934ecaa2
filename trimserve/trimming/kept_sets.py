"""What trimming decided for one sequence, as plain data: enough to compute it again alike."""

from dataclasses import dataclass

__all__ = ["KeptSets"]


@dataclass(frozen=True, slots=True)
class KeptSets:
    """Placeholder until the loop returns it."""
