"""Merging: the features that selection drops are averaged in groups, and each group stays as one row.

Dropping a feature takes its share of the attention away and hands it to the others. A row that stands for s alike
features gets log s added to its logit, as s equal rows would come to (*proportional attention*), so what is merged
goes on to weigh what it weighed (ADR-0004). It knows no heads, no budget and no layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve import ops
from trimserve.ops.upload import upload
from trimserve.trimming.budget import budget

__all__ = ["Groups", "group_dropped"]

_CANDIDATES = 64
"""Features among which the next anchors of a tile are looked for; more cost more and are searched less often."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Which dropped features become one row; the groups of a tile follow each other, and the tiles of an image."""

    members: Tensor
    """int64 [S], the dropped features, group after group and ascending in each."""
    sizes: Tensor
    """int64 [G], members of each group, at least 1; they sum to S."""
    num_groups: tuple[int, ...]
    """Groups of each image; they sum to G."""
    rows: Tensor | None = None
    """[G, D], what was made of each group's features; None is their mean."""

    @classmethod
    def of(cls, images: Sequence[tuple["Groups", int]]) -> "Groups":
        """Those of several images, each with the place where the image's features begin."""
        made = [groups.rows for groups, _ in images if groups.rows is not None]
        return cls(
            torch.cat([start + groups.members for groups, start in images]),
            torch.cat([groups.sizes for groups, _ in images]),
            tuple(num_groups for groups, _ in images for num_groups in groups.num_groups),
            torch.cat(made) if made else None,
        )

    def stand_for(self, features: Tensor) -> Tensor:
        """The row that stands for each group, [G, D]: what was made of its features [N, D], or their mean."""
        return self.mean(features) if self.rows is None else self.rows.to(features)

    def mean(self, rows: Tensor) -> Tensor:
        """Average the rows of each group: [N, ...] -> [G, ...], in float32 and rounded once."""
        # Gathers no members, and unlike index_add_ sums alike in every run on CUDA, too.
        starts = self.sizes.cumsum(dim=0) - self.sizes
        means = F.embedding_bag(self.members, rows.flatten(1).float(), starts, mode="mean")
        return means.to(rows.dtype).view(len(means), *rows.shape[1:])


def group_dropped(
    keys: Tensor, kept: Tensor, num_features: Sequence[int], features_per_tile: int, merge_ratio: float
) -> Groups:
    """Group the features of each tile that are not kept.

    A group gathers around an anchor, and the anchors of a tile are far apart: the first is the dropped feature least
    like the mean of the dropped, each further one the feature least like the anchors before it, that is, like the
    nearest of them (cosine of the keys; tie: lower index, up to rounding). Every other dropped feature joins the anchor
    that it is most like (tie: the earlier one).

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
    most = budget(merge_ratio, features_per_tile)
    members, sizes = [], []
    dropped, counts = is_dropped.nonzero()[:, 0], is_dropped.view(-1, features_per_tile).sum(dim=1).tolist()
    for places in dropped.split(counts):
        count = min(most, len(places))
        directions = keys.index_select(0, places).flatten(1).float()
        group = _nearest_anchors(F.normalize(directions, dim=1, out=directions), count)
        members.append(places[group.argsort(stable=True)])
        sizes.append(group.new_zeros(count).index_add_(0, group, torch.ones_like(group)))
    per_tile = iter(map(len, sizes))
    num_groups = tuple(sum(islice(per_tile, n // features_per_tile)) for n in num_features)
    return Groups(torch.cat(members), torch.cat(sizes), num_groups)


def _nearest_anchors(directions: Tensor, count: int) -> Tensor:
    """For each feature the number of its anchor, int64 [n].

    Every anchor is the feature with the least likeness to its nearest anchor, and likeness to the nearest only grows as
    anchors are added. So a feature that is not among the candidates, the least like any anchor so far, cannot be next
    while a candidate is below all of them; until then only candidates are compared, with each other, and every other
    feature with all the new anchors in one product. A GPU is waited for once in each round.

    Args:
        directions: float32 [n, D], of length 1.
        count: anchors, at most n.
    """
    group = torch.zeros(len(directions), dtype=torch.int64, device=directions.device)
    if not count:
        return group
    new = (directions @ directions.mean(dim=0)).argmin(dim=0, keepdim=True)
    closest = torch.full(group.shape, -math.inf, device=group.device)  # likeness to the nearest anchor
    num_known = 0
    while True:
        likeness, nearest = _products(directions[new], directions).max(dim=0)
        group = torch.where(likeness > closest, num_known + nearest, group)
        closest = torch.maximum(likeness, closest)
        group[new] = torch.arange(num_known, num_known + len(new), device=group.device)
        closest.index_fill_(0, new, math.inf)
        num_known += len(new)
        if num_known == count:
            return group
        new = _next_anchors(directions, closest, count - num_known)


def _products(few: Tensor, directions: Tensor) -> Tensor:
    """[R, D] of few rows, [n, D] -> [R, n]."""
    if few.device.type == "cpu":
        return ops.linear(few, directions, None)  # faster there than torch for so few rows
    return F.linear(few, directions)


def _next_anchors(directions: Tensor, closest: Tensor, most: int) -> Tensor:
    """The anchors that follow: at least one, and as many as can be told from the candidates alone.

    Args:
        directions: float32 [n, D].
        closest: float32 [n], likeness to the nearest anchor so far; infinite for anchors.
        most: anchors that are wanted, at least one.
    Returns:
        int64 [anchors]
    """
    least = closest.topk(min(_CANDIDATES, len(closest)), largest=False)
    places = least.indices.sort().values  # ascending: argmin takes the first of equal ones
    candidates = directions[places]
    # float64 holds every place: the host reads once.
    told = torch.cat([_products(candidates, candidates), closest[places][:, None]], dim=1).double()
    read = torch.cat([told, places[:, None].double()], dim=1).cpu().numpy()
    likeness, nearest = read[:, :-2], read[:, -2].copy()
    limit = nearest.max() if len(places) < len(closest) else math.inf
    nearest[~(nearest < limit)] = math.inf  # of those as near as the limit topk takes any
    found: list[int] = []
    for _ in range(min(most, len(places))):
        next_one = int(nearest.argmin())
        if not nearest[next_one] < limit:
            break
        found.append(next_one)
        np.maximum(nearest, likeness[next_one], out=nearest)
        nearest[next_one] = math.inf
    if not found:
        return closest.argmin(dim=0, keepdim=True)
    return upload(read[found, -1].astype(np.int64), closest.device)
