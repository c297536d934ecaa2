"""Angles of the rotary position embedding, computed once for each position."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MllamaConfig

from trimserve.errors import CheckpointError
from trimserve.model.checkpoint import text_config
from trimserve.model.transformers_mllama import Rotary, rotary_of
from trimserve.ops.upload import upload_ids

__all__ = ["RotaryAngles", "Rotation", "check_rotary"]

_FEWEST = 256


def check_rotary(file: Path, config: MllamaConfig) -> None:
    """Refuse parameters of the rotary embedding that give no angles, or others to a longer prompt.

    Args:
        file: that the config was read from, for the error.
        config: of a checkpoint.
    Raises:
        CheckpointError: names the parameters.
    """
    parameters = text_config(config).rope_parameters
    field = f"{file}: text_config.rope_parameters"
    if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
        raise CheckpointError(f"{field}: rope_type longrope is not supported: longer prompts have other angles")
    try:
        rotary = rotary_of(config)
        is_finite = bool(rotary.frequencies.isfinite().all()) and math.isfinite(rotary.scaling)
    except Exception as error:  # transformers raises whatever it meets
        raise CheckpointError(f"{field}: {type(error).__name__}: {error}, got {parameters}") from error
    if not is_finite:
        raise CheckpointError(f"{field} must give finite angles, got {parameters}")


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
