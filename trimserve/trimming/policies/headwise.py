"""The rule of `trimmed`: every head picks, and the union of the picks stays. Other policies count by it."""

import math
from bisect import bisect_left

import torch
from torch import Tensor

from trimserve import ops
from trimserve.api.trim import FixedCount, FixedRatio
from trimserve.trimming.budget import Allowance, HeadRatio, cap, counts
from trimserve.trimming.encoded_image import Choice
from trimserve.trimming.policies.view import SeenImage

__all__ = ["choose_headwise"]


def choose_headwise(image: SeenImage, allowance: Allowance) -> Choice:
    """Keep the union of what the query heads pick, see `Trimmed`; the choice carries the picks."""
    scores, asked = image.scores, allowance.budget
    num_features = image.num_features
    most = cap(allowance.max_fraction, num_features)
    if isinstance(asked, FixedRatio | FixedCount):
        most = allowance.count(scores[0])
        picks = _top(scores, _smallest_k(scores, most))
    elif isinstance(asked, HeadRatio):
        k = counts(asked, scores)[0]
        if most == num_features and not image.view.wants_picks:
            padded, num_kept = ops.select_features(scores, [num_features], [k])
            return Choice(padded[: int(num_kept)])
        picks = _top(scores, k)
    else:
        picks = _ragged_top(scores, torch.tensor(counts(asked, scores), device=scores.device))
    padded, num_kept = ops.union_indices(picks[picks >= 0][None], num_features)
    kept = padded[: int(num_kept)]
    return Choice(kept if len(kept) <= most else _capped(kept, picks, scores, most), picks)


def _top(scores: Tensor, k: int) -> Tensor:
    return ops.headwise_topk(scores, [scores.shape[1]], [k])


def _ragged_top(scores: Tensor, ks: Tensor) -> Tensor:
    """Picks [H, max k] in the order of `ops.headwise_topk`; -1 past a head's own k."""
    order = (-scores).argsort(dim=1, stable=True)[:, : int(ks.max())]
    return order.masked_fill(torch.arange(order.shape[1], device=ks.device) >= ks[:, None], -1)


def _smallest_k(scores: Tensor, count: int) -> int:
    """The fewest picks of each head whose union has `count` features."""
    num_features = scores.shape[1]
    ks = range(-(-count // len(scores)), count + 1)  # unions grow with k

    def num_kept(k: int) -> int:
        return int(ops.select_features(scores, [num_features], [k])[1])

    return ks[bisect_left(ks, count, key=num_kept)]


def _capped(kept: Tensor, picks: Tensor, scores: Tensor, most: int) -> Tensor:
    votes = torch.bincount(picks[picks >= 0], minlength=scores.shape[1])
    best = scores.nan_to_num(-math.inf).amax(dim=0)
    # Stable sorts from the least to the most important key; `kept` is ascending, which settles the last tie.
    kept = kept[best[kept].argsort(descending=True, stable=True)]
    kept = kept[votes[kept].argsort(descending=True, stable=True)]
    return kept[:most].sort().values
