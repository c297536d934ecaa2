"""What every trained compressor is: a tile's patches in, a few new rows out, each of which stands for some patches.

It starts as a plain mean of the patches that a row stands for and learns what to add, in units of the tile's features,
so that one learning rate fits every model. Unless a method says otherwise, a row stands for patches that are alike:
cross-attention knows no places, and means of alike patches lose far less than those of neighbours (docs/policies.md).
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.trained import Shape, Trained

__all__ = ["Compressed", "Compressor", "Regions", "alike", "silent"]


class Compressed(NamedTuple):
    """What a compressor makes of t tiles."""

    rows: Tensor
    """float32 [t, W, D]"""
    group: Tensor
    """int64 [t, P], in [0, W): which row each patch counts for; every row has one."""


class Regions(NamedTuple):
    """Which patches each of W rows of t tiles stands for."""

    is_own: Tensor
    """bool [t, W, P]"""
    means: Tensor
    """float32 [t, W, P], averages them."""

    @classmethod
    def of(cls, group: Tensor, num_rows: int) -> "Regions":
        """Of patches by their groups, int64 [t, P]."""
        is_own = group[:, None] == torch.arange(num_rows, device=group.device)[:, None]
        return cls(is_own, is_own / is_own.sum(dim=-1, keepdim=True))


class Compressor(Trained, ABC):
    """Weights of one method for one model and one number of rows."""

    reads_text: ClassVar[bool] = False
    """Whether it looks at the question."""

    def __init__(self, shape: Shape) -> None:
        """See `Trained`."""
        super().__init__(shape)
        if not 2 <= shape.rows <= shape.features_per_tile:
            raise ValueError(f"must be in [2, {shape.features_per_tile}], got {shape.rows}")

    @property
    def num_new_rows(self) -> int:
        """W, of a tile."""
        return self.shape.rows - 1

    def forward(self, tiles: Tensor, text: Tensor | None = None) -> Compressed:
        """Compress tiles, each for itself.

        Args:
            tiles: [t, F, D], the class token first; any float dtype.
            text: [t, D], what each tile's question is about; None if the method does not read it.
        """
        patches = tiles[:, 1:].float()
        size = patches.square().mean(dim=(1, 2), keepdim=True).sqrt()
        group = self.group(patches)
        regions = Regions.of(group, self.num_new_rows)
        weights = self.weights(patches, regions, text)
        return Compressed(weights @ patches + size * self.change(patches, regions, weights, text), group)

    def group(self, patches: Tensor) -> Tensor:
        """Which row each patch counts for, [t, P, D] -> int64 [t, P]."""
        return alike(patches, self.num_new_rows)

    def weights(self, patches: Tensor, regions: Regions, text: Tensor | None) -> Tensor:  # noqa: ARG002 - some look
        """How much of each patch is in each row's mean, float32 [t, W, P]; a row's sum to 1.

        Args:
            patches: float32 [t, P, D].
            regions: of the rows.
            text: see `forward`.
        """
        return regions.means

    @abstractmethod
    def change(self, patches: Tensor, regions: Regions, weights: Tensor, text: Tensor | None) -> Tensor:
        """What is added to the mean, in units of the tile's features.

        Args:
            patches: float32 [t, P, D].
            regions: of the rows.
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


@torch.no_grad()
def alike(patches: Tensor, num_groups: int) -> Tensor:
    """Group each tile's patches around anchors that are far apart, as `merging.group_dropped` does, for many tiles.

    Args:
        patches: float32 [t, P, D].
        num_groups: W, at most P.
    Returns:
        int64 [t, P], in [0, W); every group has a patch.
    """
    directions = F.normalize(patches, dim=-1).nan_to_num(0)
    tiles = torch.arange(len(patches), device=patches.device)
    group = torch.zeros(patches.shape[:2], dtype=torch.int64, device=patches.device)
    closest = torch.full_like(directions[..., 0], -torch.inf)
    anchor = (directions @ directions.mean(dim=1)[..., None])[..., 0].argmin(dim=1)
    for number in range(num_groups):
        likeness = (directions @ directions[tiles, anchor][..., None])[..., 0]
        group = torch.where(likeness > closest, number, group)
        closest = torch.maximum(likeness, closest)
        group[tiles, anchor] = number
        closest[tiles, anchor] = torch.inf
        anchor = closest.argmin(dim=1)
    return group
