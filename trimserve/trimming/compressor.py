"""What every trained compressor is: a tile's patches in, a few new rows out, each of which stands for some patches.

It starts as a plain mean of the patches that a row stands for, like the policy `pool`, and learns what to add. Sizes of
what is added are relative to the tile's features, so that one learning rate fits every model.
"""

from abc import ABC, abstractmethod
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimserve.trimming.trained import Shape, Trained

__all__ = ["Compressor", "grid", "shares", "silent"]


class Compressor(Trained, ABC):
    """Weights of one method for one model and one number of rows."""

    reads_text: ClassVar[bool] = False
    """Whether it looks at the question."""

    group: Tensor
    """int64 [P], the new row that each patch of a tile counts for."""

    def __init__(self, shape: Shape) -> None:
        """Begin as the mean of each row's patches.

        Raises:
            ValueError: it cannot make so many rows.
        """
        super().__init__(shape)
        if not 2 <= shape.rows <= shape.features_per_tile:
            raise ValueError(f"must be in [2, {shape.features_per_tile}], got {shape.rows}")
        group = self.assign(shape.features_per_tile - 1, shape.rows - 1)
        self.register_buffer("group", group, persistent=False)
        counts = torch.bincount(group)
        is_own = group == torch.arange(len(counts))[:, None]
        self.register_buffer("is_own", is_own, persistent=False)
        self.register_buffer("means", is_own / counts[:, None], persistent=False)

    is_own: Tensor
    """bool [W, P], which patches each row stands for."""
    means: Tensor
    """float32 [W, P], averages them."""

    @staticmethod
    def assign(num_patches: int, num_new_rows: int) -> Tensor:
        """Which of the W new rows each of P patches counts for, int64 [P], each row at least once."""
        return grid(num_patches, num_new_rows)

    def forward(self, tiles: Tensor, text: Tensor | None = None) -> Tensor:
        """Compress tiles, each for itself.

        Args:
            tiles: [t, F, D], the class token first; any float dtype.
            text: [t, D], what each tile's question is about; None if the method does not read it.
        Returns:
            float32 [t, W, D].
        """
        tiles = tiles.float()
        size = tiles.square().mean(dim=(1, 2), keepdim=True).sqrt()
        weights = self.weights(tiles, text)
        return weights @ tiles[:, 1:] + size * self.change(tiles, weights, text)

    def weights(self, tiles: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - those who look override it
        """How much of each patch is in each row's mean, float32 [W, P] or [t, W, P], rows that sum to 1.

        Args:
            tiles: float32 [t, F, D].
            text: see `forward`.
        """
        return self.means

    @abstractmethod
    def change(self, tiles: Tensor, weights: Tensor, text: Tensor | None) -> Tensor:
        """What is added to the mean, in units of the tile's features.

        Args:
            tiles: float32 [t, F, D].
            weights: what `weights` says.
            text: see `forward`.
        Returns:
            float32 [t, W, D], 0 before any training.
        """


def silent(inside: int, width: int) -> nn.Linear:
    """A linear layer that gives 0 until it is trained."""
    linear = nn.Linear(inside, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def grid(num_patches: int, num_windows: int) -> Tensor:
    """Cut a tile into windows, as square as their number allows.

    Args:
        num_patches: P, of the tile, a square number.
        num_windows: W = a * b with a and b at most the tile's side.
    Returns:
        int64 [P], the window of each patch, row by row.
    Raises:
        ValueError: there is no such a and b.

    >>> grid(16, 4).view(4, 4)[0].tolist()
    [0, 0, 1, 1]
    """
    side = isqrt(num_patches)
    high = next((high for high in range(isqrt(num_windows), 0, -1) if num_windows % high == 0), 0)
    if not high or num_windows // high > side:
        raise ValueError(f"must be 1 + a * b with a and b at most {side}, got {num_windows + 1}")
    place = torch.arange(side)
    wide = num_windows // high
    return ((place * high // side)[:, None] * wide + place * wide // side).flatten()


def shares(num_patches: int, num_rows: int) -> Tensor:
    """Let rows that see the whole tile count for equally many patches, in order.

    >>> shares(4, 2).tolist()
    [0, 0, 1, 1]
    """
    return torch.arange(num_patches) * num_rows // num_patches
