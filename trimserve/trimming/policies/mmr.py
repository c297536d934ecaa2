"""The policy `mmr`: what the text attends to, less what looks like something that is kept already."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage, parameter
from trimserve.trimming.policies.tiles import first_of, is_broken, likeness, next_pick, quotas_by, relevance

__all__ = ["Mmr"]


@dataclass(frozen=True, slots=True)
class Mmr(AfterFirstLayer):
    """Features are taken one by one; the next is the one with the largest marginal relevance.

        next = argmax_n  w * relevance[n] - (1 - w) * max_{m kept} cos(f[n], f[m])

    relevance is the score of `mean`, scaled to [0, 1] over the image; w is `relevance_weight`.

    Source: maximal marginal relevance, as IDPruner, arXiv 2602.13315, uses it. Adapted: the relevance is the attention
    of the first cross-attention layer; features are compared within their tile, and a tile gets as many as it has
    among the image's most relevant.
    """

    name: ClassVar[str] = "mmr"

    relevance_weight: float = parameter(0.5, 0, 1, "Relevance against difference: 1 is `mean`, 0 looks at no text.")

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        size, score = image.features_per_tile, relevance(image.scores)
        quotas = quotas_by(score, allowance.count(image.scores.mean(dim=0)), size)
        like, is_late = likeness(image.features, size), is_broken(image.features, size)
        wanted = self.relevance_weight * score.view(-1, size)
        closest = torch.full_like(wanted, -1.0)  # as unlike as can be: nothing is kept yet
        is_taken = torch.zeros_like(is_late)
        picks = []
        for _ in range(max(quotas)):
            pick = next_pick(wanted - (1 - self.relevance_weight) * closest, is_taken, is_late)
            picks.append(pick)
            closest = torch.maximum(closest, like.take_along_dim(pick[..., None], dim=1)[:, 0])
        return Choice(first_of(torch.cat(picks, dim=1), quotas, size))
