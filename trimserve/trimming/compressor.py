"""What every trained compressor is: an image's patches in, a few new rows out, each of which stands for some patches.

It starts as a plain mean of the patches that a row stands for and learns what to add, in units of the image's features,
so that one learning rate fits every model. Unless a method says otherwise, a row stands for patches that are alike,
wherever they are: cross-attention knows no places, and means of alike patches lose far less than those of neighbours.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.trained import Shape, Trained

__all__ = ["Compressed", "Compressor", "Regions", "alike", "silent"]

_REFINED: Final = 3
"""Rounds in which groups of alike patches move to their centres."""


class Compressed(NamedTuple):
    """What a compressor makes of b images with as many tiles each."""

    rows: Tensor
    """float32 [b, W, D]"""
    group: Tensor
    """int64 [b, N], in [0, W): which row each patch counts for; every row has one."""


class Regions:
    """Which of N patches each of W rows stands for, of b images."""

    def __init__(self, group: Tensor, num_rows: int) -> None:
        """Count them.

        Args:
            group: int64 [b, N], in [0, W).
            num_rows: W.
        """
        self.group = group
        self.sizes = torch.zeros(len(group), num_rows, device=group.device)
        """float32 [b, W], patches of each region."""
        self.sizes.scatter_add_(1, group, torch.ones_like(group, dtype=torch.float32))

    def sum(self, values: Tensor) -> Tensor:
        """Over each region, [b, N, C] -> [b, W, C]."""
        sums = values.new_zeros(*self.sizes.shape, values.shape[2])
        return sums.scatter_add(1, self.group[..., None].expand_as(values), values)

    def mean(self, values: Tensor) -> Tensor:
        """Over each region, [b, N, C] -> [b, W, C]."""
        return self.sum(values) / self.sizes[..., None]

    def spread(self, rows: Tensor) -> Tensor:
        """To the patches of each region, [b, W, C] -> [b, N, C]."""
        return rows.gather(1, self.group[..., None].expand(-1, -1, rows.shape[2]))

    def softmax(self, logits: Tensor) -> Tensor:
        """Within each region, [b, N, 1] -> [b, N, 1]."""
        highest = self.sizes.scatter_reduce(1, self.group, logits.detach()[..., 0], "amax", include_self=False)
        weights = (logits - self.spread(highest[..., None])).exp()
        return weights / self.spread(self.sum(weights))


class Compressor(Trained, ABC):
    """Weights of one method for one model and one number of rows of a tile."""

    reads_text: ClassVar[bool] = False
    """Whether it looks at the question."""

    def __init__(self, shape: Shape) -> None:
        """See `Trained`."""
        super().__init__(shape)
        if not 2 <= shape.rows <= shape.features_per_tile:
            raise ValueError(f"must be in [2, {shape.features_per_tile}], got {shape.rows}")

    @property
    def new_rows_per_tile(self) -> int:
        """Rows beside the class token; an image has as many for each of its tiles."""
        return self.shape.rows - 1

    def forward(self, tiles: Tensor, text: Tensor | None = None) -> Compressed:
        """Compress images, each for itself.

        Args:
            tiles: [b, t, F, D], the class token of each tile first; any float dtype.
            text: [b, D], what each image's question is about; None if the method does not read it.
        """
        patches = tiles[:, :, 1:].flatten(1, 2).float()
        size = patches.square().mean(dim=(1, 2), keepdim=True).sqrt()
        num_rows = tiles.shape[1] * self.new_rows_per_tile
        group = self.group(patches, num_rows)
        mean, change = self.made(patches, Regions(group, num_rows), text)
        return Compressed(mean + size * change, group)

    def group(self, patches: Tensor, num_rows: int) -> Tensor:
        """Which of the rows each patch counts for, float32 [b, N, D] -> int64 [b, N]."""
        return alike(patches, num_rows)

    @abstractmethod
    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """A mean of features for each row, and what is added to it, in units of the image's features.

        Args:
            patches: float32 [b, N, D].
            regions: of the rows.
            text: see `forward`.
        Returns:
            float32 [b, W, D] each; before any training what is added is 0.
        """


def silent(inside: int, width: int) -> nn.Linear:
    """A linear layer that gives 0 until it is trained."""
    linear = nn.Linear(inside, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def alike(patches: Tensor, num_groups: int) -> Tensor:
    """Group each image's patches by the cosine of their features.

    Anchors are far apart, as in `merging.group_dropped`, each patch joins the nearest; then, a few times, every group
    gets its centre for an anchor (spherical k-means), unless one would be left without patches.

    Args:
        patches: float32 [b, N, D].
        num_groups: W, at most N.
    Returns:
        int64 [b, N], in [0, W); every group has a patch.
    """
    directions = F.normalize(patches, dim=-1).nan_to_num(0)
    group = _around_anchors(directions, num_groups)
    for _ in range(_REFINED):
        centres = F.normalize(Regions(group, num_groups).sum(directions), dim=-1)
        nearest = (directions @ centres.transpose(1, 2)).argmax(dim=-1)
        is_whole = (Regions(nearest, num_groups).sizes > 0).all(dim=-1, keepdim=True)
        group = torch.where(is_whole, nearest, group)
    return group


def _around_anchors(directions: Tensor, num_groups: int) -> Tensor:
    images = torch.arange(len(directions), device=directions.device)
    group = torch.zeros(directions.shape[:2], dtype=torch.int64, device=directions.device)
    closest = torch.full_like(directions[..., 0], -torch.inf)
    anchor = (directions @ directions.mean(dim=1)[..., None])[..., 0].argmin(dim=1)
    for number in range(num_groups):
        likeness = (directions @ directions[images, anchor][..., None])[..., 0]
        group = torch.where(likeness > closest, number, group)
        closest = torch.maximum(likeness, closest)
        group[images, anchor] = number
        closest[images, anchor] = torch.inf
        anchor = closest.argmin(dim=1)
    return group
