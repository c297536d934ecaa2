"""The policy `divprune`: features that are as far from each other as can be."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.tiles import even_quotas, first_of, is_broken, likeness, next_pick

__all__ = ["DivPrune"]


@dataclass(frozen=True, slots=True)
class DivPrune(BeforeDecoder):
    """Features are taken one by one; the next is the one whose nearest kept feature is furthest.

        next = argmax_n  min_{m kept} 1 - cos(f[n], f[m]);   the first is furthest from its nearest of all features

    Source: DivPrune, arXiv 2503.02175, the greedy solution of the max-min diversity problem. Adapted: features are
    compared within their tile, and every tile keeps the same number; a remainder goes to the first tiles. It ranks by
    no score, so only a ratio or a count can be its budget.
    """

    name: ClassVar[str] = "divprune"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        far, is_late = likeness(image.features, size).neg_().add_(1), is_broken(image.features, size)
        quotas = even_quotas(allowance.count(far.new_zeros(image.num_features)), len(far))
        far.masked_fill_(is_late[:, None], torch.inf).diagonal(dim1=1, dim2=2).fill_(torch.inf)
        gain = far.amin(dim=2)
        nearest = torch.full_like(gain, torch.inf)
        is_taken = torch.zeros_like(is_late)
        picks = []
        for _ in range(max(quotas)):
            pick = next_pick(gain, is_taken, is_late)
            picks.append(pick)
            gain = nearest = torch.minimum(nearest, far.take_along_dim(pick[..., None], dim=1)[:, 0])
        return Choice(first_of(torch.cat(picks, dim=1), quotas, size))
