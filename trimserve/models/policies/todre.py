"""The policy `todre`: features whose distances from each other add up to the most."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.models.encoded_image import Choice, EncodedImage
from trimserve.models.policies.budget import Allowance
from trimserve.models.policies.policy import BeforeDecoder
from trimserve.models.policies.tiles import even_quotas, first_of, is_broken, likeness, next_pick

__all__ = ["ToDRE"]


@dataclass(frozen=True, slots=True)
class ToDRE(BeforeDecoder):
    """Features are taken one by one; the next has the largest sum of distances to those that are kept.

        next = argmax_n  sum_{m kept} 1 - cos(f[n], f[m]);   the first has the largest sum to all features

    Source: ToDRE, arXiv 2505.18757, stage 1 in its second version (max-sum diversification). Adapted: features are
    compared within their tile, and every tile keeps as many, the first ones one more. Left out: stage 2, which drops
    all visual features in late layers; the pages of several cross-attention layers share one kept set. It ranks by no
    score, so only a ratio or a count can be its budget.
    """

    name: ClassVar[str] = "todre"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        far, is_late = likeness(image.features, size).neg_().add_(1), is_broken(image.features, size)
        quotas = even_quotas(allowance.count(far.new_zeros(image.num_features)), len(far))
        gain, total = far.masked_fill_(is_late[:, None], 0).sum(dim=2), torch.zeros_like(far[:, 0])
        is_taken = torch.zeros_like(is_late)
        picks = []
        for _ in range(max(quotas)):
            pick = next_pick(gain, is_taken, is_late)
            picks.append(pick)
            gain = total = total + far.take_along_dim(pick[..., None], dim=1)[:, 0]
        return Choice(first_of(torch.cat(picks, dim=1), quotas, size))
