"""Merging: the features that selection drops are averaged in groups, and each group stays as one row.

Dropping a feature takes its share of the attention away and hands it to the others. A row that stands for s alike
features gets log s added to its logit, as s equal rows would come to (*proportional attention*), so what is merged
goes on to weigh what it weighed (ADR-0004). It knows no heads, no budget and no layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.models.policies.budget import budget

__all__ = ["Groups", "group_dropped"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which dropped features become one row; the groups of a tile follow each other, and the tiles of an image."""

    members: Tensor
    """int64 [S], the dropped features, group after group and ascending in each."""
    sizes: Tensor
    """int64 [G], members of each group, at least 1; they sum to S."""
    num_groups: tuple[int, ...]
    """Groups of each image; they sum to G."""

    @classmethod
    def of(cls, images: Sequence[tuple["Groups", int]]) -> "Groups":
        """Those of several images, each with the place where the image's features begin."""
        return cls(
            torch.cat([start + groups.members for groups, start in images]),
            torch.cat([groups.sizes for groups, _ in images]),
            tuple(num_groups for groups, _ in images for num_groups in groups.num_groups),
        )

    def mean(self, rows: Tensor) -> Tensor:
        """Average the rows of each group: [N, ...] -> [G, ...], in float32 and rounded once."""
        # Not index_add_, whose sums differ from run to run on CUDA; unsafe: the lengths need no check.
        means = torch.segment_reduce(rows[self.members].float(), "mean", lengths=self.sizes, unsafe=True)
        return means.to(rows.dtype)


def group_dropped(
    keys: Tensor, kept: Tensor, num_features: Sequence[int], features_per_tile: int, merge_ratio: float
) -> Groups:
    """Group the features of each tile that are not kept.

    A group gathers around an anchor, and the anchors of a tile are far apart: the first is the dropped feature least
    like the mean of the dropped, each further one the feature least like the anchors before it, that is, like the
    nearest of them (cosine of the keys; tie: lower index). Every other dropped feature joins the anchor that it is
    most like (tie: the earlier one).

    Args:
        keys: [N, Hkv, Dh], keys of the first cross-attention layer.
        kept: int64 [M], ascending.
        num_features: features of each image, multiples of `features_per_tile`; they sum to N.
        features_per_tile: tiles follow each other.
        merge_ratio: in (0, 1]: a tile gets `budget(merge_ratio, features_per_tile)` groups, or as many as it has
            dropped features.
    Source: size-weighted attention from ToMe, arXiv 2210.09461, section 3; anchors by farthest-point sampling.
    """
    is_dropped = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
    is_dropped[kept] = False
    is_dropped = is_dropped.view(-1, features_per_tile)
    directions = F.normalize(keys.flatten(1).float(), dim=1).view(*is_dropped.shape, -1)
    most = budget(merge_ratio, features_per_tile)
    # Groups are numbered over all tiles as if each had the most; numbers that no feature has fall out below.
    tiles = torch.arange(is_dropped.shape[0], device=keys.device)
    group = (_nearest_anchors(directions, is_dropped, most) + most * tiles[:, None])[is_dropped]
    order = group.argsort(stable=True)
    sizes = torch.bincount(group, minlength=most * len(tiles))
    per_tile = (sizes.view(-1, most) > 0).sum(dim=1)
    num_groups = tuple(int(part.sum()) for part in per_tile.split([n // features_per_tile for n in num_features]))
    return Groups(is_dropped.flatten().nonzero()[order, 0], sizes[sizes > 0], num_groups)


def _nearest_anchors(directions: Tensor, is_dropped: Tensor, most: int) -> Tensor:
    """For each feature the number of its anchor among the tile's, int64 [tiles, features]; of kept ones any number.

    Args:
        directions: float32 [tiles, features, D], of length 1.
        is_dropped: bool [tiles, features].
        most: anchors of a tile with as many dropped features.
    """
    mean = (directions * is_dropped[..., None]).mean(dim=1, keepdim=True)
    anchor = _likeness(directions, mean).masked_fill(~is_dropped, math.inf).argmin(dim=1, keepdim=True)
    nearest = torch.zeros_like(is_dropped, dtype=torch.int64)
    # Likeness to the nearest anchor so far. It is infinite for kept features and for anchors: neither becomes an
    # anchor again or changes its group, and where no other is left a round changes nothing.
    closest = torch.where(is_dropped, -math.inf, math.inf)
    for place in range(most):
        likeness = _likeness(directions, directions.take_along_dim(anchor[..., None], dim=1))
        likeness.scatter_(1, anchor, math.inf)
        nearest.masked_fill_(likeness > closest, place)
        closest = torch.maximum(closest, likeness)
        anchor = closest.argmin(dim=1, keepdim=True)
    return nearest


def _likeness(directions: Tensor, other: Tensor) -> Tensor:
    """Dot products of [tiles, features, D] with one other of each tile, [tiles, 1, D] -> [tiles, features]."""
    return (directions @ other.transpose(1, 2))[..., 0]
