"""The policy `cdpruner`: the most likely sample of a determinantal point process, relevance times diversity."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage, parameter
from trimserve.trimming.policies.tiles import first_of, is_broken, likeness, next_pick, quotas_by, relevance

__all__ = ["CDPruner"]

_NOTHING_NEW = 1e-6
"""Gains below this are rounding: the feature is a combination of those that are kept."""


@dataclass(frozen=True, slots=True)
class CDPruner(AfterFirstLayer):
    """Features are taken one by one; the next adds most to the determinant of the kernel of those that are kept.

        L[n, m] = r[n] * cos(f[n], f[m]) * r[m],   r[n] = relevance[n] ** relevance_power
        next    = argmax_n  det L[kept + n] / det L[kept]

    relevance is the score of `mean`, scaled to [0, 1] over the image. Where no feature adds anything, the most relevant
    goes first.

    Source: CDPruner, arXiv 2506.10967; the greedy algorithm with one Cholesky row per step is that of Chen et al.,
    arXiv 1709.05135, algorithm 1. Adapted: the relevance comes from the first cross-attention layer, because Mllama has
    no text encoder that is paired with its vision encoder; features are compared within their tile, and a tile gets as
    many as it has among the image's most relevant.
    """

    name: ClassVar[str] = "cdpruner"

    relevance_power: float = parameter(1.0, 0, 16, "Exponent of the relevance: 0 looks at no text.")

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        size, score = image.features_per_tile, relevance(image.scores)
        quotas = quotas_by(score, allowance.count(image.scores.mean(dim=0)), size)
        score = score.view(-1, size)
        quality = score**self.relevance_power
        kernel = likeness(image.features, size).mul_(quality[:, :, None]).mul_(quality[:, None])
        order = _greedy(kernel, score, is_broken(image.features, size), max(quotas))
        return Choice(first_of(order, quotas, size))


def _greedy(kernel: Tensor, score: Tensor, is_late: Tensor, steps: int) -> Tensor:
    """The first picks of each tile, int64 [tiles, steps], by kernels [tiles, F, F]; ties by score, in [0, 1]."""
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = kernel.new_zeros(len(kernel), steps, kernel.shape[2])  # of the Cholesky factor, one per pick
    is_taken = torch.zeros_like(is_late)
    picks = []
    for step in range(steps):
        pick = next_pick(torch.where(gain > _NOTHING_NEW, gain, score - 2), is_taken, is_late)
        picks.append(pick)
        known = rows[:, :step].take_along_dim(pick[:, None], dim=2).transpose(1, 2) @ rows[:, :step]
        own = gain.take_along_dim(pick, dim=1)
        row = (kernel.take_along_dim(pick[..., None], dim=1) - known)[:, 0] / own.clamp(min=_NOTHING_NEW).sqrt()
        rows[:, step] = row.where(own > _NOTHING_NEW, 0)
        gain = gain - rows[:, step] ** 2
    return torch.cat(picks, dim=1)
