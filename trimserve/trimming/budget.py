"""How many features of an image may stay: a share, a count, or as many as the scores themselves call for.

Policies rank, budgets count: any policy that has scores takes any budget. It knows no model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, TopP

__all__ = ["Allowance", "HeadRatio", "budget", "cap", "counts"]

_ROUNDING = 1e-9  # 0.55 * 100 is 55.00000000000001 in double precision and must give 55


def budget(ratio: float, num_features: int) -> int:
    """A share of an image's features as a count.

    Args:
        ratio: in (0, 1].
        num_features: N, valid features of the image, at least 1.
    Returns:
        ceil(ratio * num_features - 1e-9), clamped to [1, num_features].

    >>> budget(0.2, 65)
    13
    """
    return min(max(math.ceil(ratio * num_features - _ROUNDING), 1), num_features)


def cap(fraction: float | None, num_features: int) -> int:
    """Most features that an image keeps: floor(fraction * num_features + 1e-9), at least 1; all if there is no cap."""
    return num_features if fraction is None else max(1, math.floor(fraction * num_features + _ROUNDING))


@dataclass(frozen=True, slots=True)
class HeadRatio:
    """Each head's share of an image; the union over heads is larger. Only for policies that take a head ratio."""

    ratio: float
    """`k_ratio`, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one image of a request may keep."""

    budget: Budget | HeadRatio
    max_fraction: float | None = None
    """Cap, in (0, 1]; None if there is none."""

    def count(self, scores: Tensor) -> int:
        """How many features may stay, in [1, N]; scores are float [N]."""
        [count] = counts(self.budget, scores[None])
        return min(count, cap(self.max_fraction, len(scores)))


def counts(asked: Budget | HeadRatio, scores: Tensor) -> list[int]:
    """How many features stay by each row of scores [G, N], in [1, N]; before any cap."""
    num_rows, num_features = scores.shape
    match asked:
        case HeadRatio(ratio) | FixedRatio(ratio):
            return [budget(ratio, num_features)] * num_rows
        case FixedCount(count):
            return [min(count, num_features)] * num_rows
        case TopP(share):
            return _counts_of_share(scores, share)
        case Knee():
            return _counts_before_knee(scores)


def _counts_of_share(scores: Tensor, share: float) -> list[int]:
    """Size of the smallest set that covers a share of each row's sum; negative scores and NaN weigh nothing."""
    mass = scores.double().nan_to_num(0).clamp(min=0).sort(dim=1, descending=True).values.cumsum(dim=1)
    is_short = mass < share * mass[:, -1:] - _ROUNDING
    sizes: list[int] = (is_short.sum(dim=1) + 1).clamp(max=scores.shape[1]).tolist()
    return sizes


def _counts_before_knee(scores: Tensor) -> list[int]:
    """Features before the bend of each row's sorted scores, at least 1; NaN counts as the lowest score.

    The bend is the point of the curve that is furthest from the straight line between its ends, both axes scaled to
    [0, 1]: what is above it stays; where the curve bulges upwards, the bend itself too. Equal scores have no bend,
    and everything stays.

    Source: the adaptive rule of arXiv 2409.01162, which cuts sorted class-token similarities at their inflection point.
    """
    num_features = scores.shape[1]
    rows = scores.double()
    lowest = rows.nan_to_num(math.inf).amin(dim=1, keepdim=True)
    falling = torch.where(rows.isnan(), lowest, rows).sort(dim=1, descending=True).values
    height = falling[:, :1] - falling[:, -1:]
    places = torch.linspace(0, 1, num_features, dtype=torch.float64, device=scores.device)
    below = 1 - places - (falling - falling[:, -1:]) / height
    bend = below.abs().argmax(dim=1)
    before = bend + (below.gather(1, bend[:, None])[:, 0] < 0)
    sizes: list[int] = torch.where(height[:, 0] > 0, before.clamp(min=1), num_features).tolist()
    return sizes
