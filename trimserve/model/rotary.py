"""Angles of the rotary position embedding, computed once for each position."""

from typing import NamedTuple

import torch
from torch import Tensor

from trimserve.model.transformers_mllama import Rotary
from trimserve.ops.upload import upload_ids

__all__ = ["RotaryAngles", "Rotation"]

_FEWEST = 256


class Rotation(NamedTuple):
    """How the queries and keys of R rows are turned, as `ops.rotate` takes it."""

    cosines: Tensor
    """float32 [R, Dh / 2]"""
    sines: Tensor

    def part(self, rows: slice) -> "Rotation":
        """Of some of the rows."""
        return Rotation(self.cosines[rows], self.sines[rows])


class RotaryAngles:
    """Cosines and sines of all positions so far."""

    def __init__(self, rotary: Rotary) -> None:
        """Compute none yet.

        Args:
            rotary: of the checkpoint; its angles must not depend on how long a prompt is.
        """
        self._rotary = rotary
        self._cosines = self._sines = torch.empty(0, device=rotary.frequencies.device)

    def at(self, positions: list[int]) -> Rotation:
        """The rotation of rows at R positions."""
        self.reserve(max(positions, default=0) + 1)
        return self.of(upload_ids(positions, self._cosines.device))

    def of(self, positions: Tensor) -> Rotation:
        """The same for positions int64 [R] on the device, which were reserved."""
        return Rotation(self._cosines[positions], self._sines[positions])

    def reserve(self, num_positions: int) -> None:
        """Make room for so many positions; up to them the angles stay where they are."""
        if num_positions > len(self._cosines):
            self._grow(max(_FEWEST, 1 << (num_positions - 1).bit_length()))

    def _grow(self, num_positions: int) -> None:
        # Multiplied element by element: a matrix product, as transformers takes, may be rounded (TF32), and angles of
        # late positions are large.
        frequencies = self._rotary.frequencies
        positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
        angles = positions[:, None] * frequencies.float()
        self._cosines, self._sines = (of(angles) * self._rotary.scaling for of in (torch.cos, torch.sin))
