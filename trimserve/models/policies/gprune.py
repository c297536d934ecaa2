"""The policy `gprune`: information flows along a graph of alike features, and those that gather most stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.models.encoded_image import Choice, EncodedImage
from trimserve.models.policies.budget import Allowance
from trimserve.models.policies.policy import BeforeDecoder, parameter, top
from trimserve.models.policies.tiles import is_broken, likeness

__all__ = ["GPrune"]


@dataclass(frozen=True, slots=True)
class GPrune(BeforeDecoder):
    """Features of a tile that are alike are neighbours; each hands its weight on to its neighbours, several times.

        A[n, m]   = softmax_m(cos(f[n], f[m]) / temperature) over the m with cos >= threshold
        score     = (norms of the features) . A^hops / degree
        degree[m] = number of n with cos(f[n], f[m]) >= threshold

    Source: G-Prune, arXiv 2501.02268, method section; threshold, temperature and hops are its own and were found on
    another model's features. Nothing was adapted.
    """

    name: ClassVar[str] = "gprune"

    threshold: float = parameter(0.5, -1, 1, "Least cosine of neighbours.")
    temperature: float = parameter(0.03, 0, 10, "Of the weights on a feature's neighbours.", is_low_open=True)
    hops: int = parameter(5, 1, 64, "How often weight is handed on.")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        like, is_late = likeness(image.features, size), is_broken(image.features, size)
        # A feature is its own neighbour, also where rounding or the threshold says otherwise.
        are_neighbours = (like >= self.threshold) | torch.eye(size, dtype=torch.bool, device=like.device)
        weights = (like / self.temperature).masked_fill(~are_neighbours, -torch.inf).softmax(dim=2)
        gathered = image.features.float().norm(dim=1).view(-1, 1, size).masked_fill(is_late[:, None], 0)
        for _ in range(self.hops):
            gathered = gathered @ weights
        scores = (gathered[:, 0] / are_neighbours.sum(dim=1)).masked_fill(is_late, torch.nan).flatten()
        return Choice(top(scores, allowance.count(scores)))
