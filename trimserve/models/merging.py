"""Merging: the features that selection drops are averaged in groups, and each group stays as one row.

Dropping a feature takes its share of the attention away and hands it to the others. A row that stands for s alike
features gets log s added to its logit, as s equal rows would come to (*proportional attention*), so what is merged
goes on to weigh what it weighed. It knows no heads, no budget and no layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.models.trimming import budget

__all__ = ["Groups", "group_dropped"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which dropped features become one row."""

    members: Tensor
    """int64 [S], the dropped features, ascending."""
    group: Tensor
    """int64 [S], the group of each member, in [0, G); the groups of an image follow each other."""
    num_groups: tuple[int, ...]
    """Groups of each image; they sum to G."""

    @property
    def sizes(self) -> Tensor:
        """int64 [G], members of each group, at least 1."""
        return torch.bincount(self.group, minlength=sum(self.num_groups))

    def mean(self, rows: Tensor) -> Tensor:
        """Average the rows of each group: [N, ...] -> [G, ...], summed in float32."""
        sizes = self.sizes
        sums = rows.new_zeros((len(sizes), *rows.shape[1:]), dtype=torch.float32)
        sums.index_add_(0, self.group, rows[self.members].float())
        return (sums / sizes.view(-1, *(1 for _ in rows.shape[1:]))).to(rows.dtype)


def group_dropped(
    keys: Tensor, kept: Tensor, num_features: Sequence[int], features_per_tile: int, merge_ratio: float
) -> Groups:
    """Group the features of each tile that are not kept.

    The anchors of a tile are chosen far apart: first the dropped feature least like the mean of the dropped, then,
    one after another, the one least like its nearest anchor (cosine of the keys; tie: lower index). Every dropped
    feature joins its most similar anchor.

    Args:
        keys: [N, Hkv, Dh], keys of the first cross-attention layer.
        kept: int64 [M], ascending, not empty.
        num_features: features of each image, multiples of `features_per_tile`; they sum to N.
        features_per_tile: tiles follow each other.
        merge_ratio: in (0, 1]: a tile gets `budget(merge_ratio, features_per_tile)` groups, or as many as it has
            dropped features.
    Source: size-weighted attention from ToMe, arXiv 2210.09461, section 3; anchors by farthest-point sampling.
    """
    num_tiles = keys.shape[0] // features_per_tile
    is_dropped = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
    is_dropped[kept] = False
    is_dropped = is_dropped.view(num_tiles, features_per_tile)
    directions = F.normalize(keys.flatten(1).float(), dim=1).view(num_tiles, features_per_tile, -1)
    anchors = _far_apart(directions, is_dropped, budget(merge_ratio, features_per_tile))
    is_anchor = anchors >= 0  # [tiles, most groups]; tiles with fewer dropped features end with -1
    likeness = directions @ _rows(directions, anchors.clamp(min=0)).transpose(1, 2)
    nearest = likeness.masked_fill(~is_anchor[:, None], -math.inf).argmax(dim=2)
    tile, place = is_anchor.nonzero(as_tuple=True)
    nearest[tile, anchors[is_anchor]] = place  # also where two anchors are alike
    per_tile = is_anchor.sum(dim=1)
    group = (nearest + (per_tile.cumsum(0) - per_tile)[:, None])[is_dropped]
    tiles = [n // features_per_tile for n in num_features]
    num_groups = tuple(int(part.sum()) for part in per_tile.split(tiles))
    return Groups(is_dropped.flatten().nonzero()[:, 0], group, num_groups)


def _far_apart(directions: Tensor, is_dropped: Tensor, most: int) -> Tensor:
    """Anchors of each tile, int64 [tiles, most], -1 where there is none left."""
    mean = (directions * is_dropped[..., None]).sum(dim=1, keepdim=True)
    closest = (directions @ mean.transpose(1, 2))[..., 0].masked_fill(~is_dropped, math.inf)
    anchors = []
    for place in range(most):
        value, chosen = closest.min(dim=1)
        anchors.append(torch.where(value.isinf(), -1, chosen))
        likeness = (directions @ _rows(directions, chosen[:, None]).transpose(1, 2))[..., 0]
        closest = likeness if place == 0 else torch.maximum(closest, likeness)
        is_dropped = is_dropped.scatter(1, chosen[:, None], False)
        closest = closest.masked_fill(~is_dropped, math.inf)
    return torch.stack(anchors, dim=1)


def _rows(directions: Tensor, indices: Tensor) -> Tensor:
    """[tiles, n, D] at int64 [tiles, m] -> [tiles, m, D]."""
    return directions.gather(1, indices[..., None].expand(-1, -1, directions.shape[2]))
