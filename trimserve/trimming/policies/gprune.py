"""The policy `gprune`: information flows along a graph of alike features, and those that gather most stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top
from trimserve.trimming.policies.tiles import is_broken, likeness

__all__ = ["GPrune"]


@dataclass(frozen=True, slots=True)
class GPrune(BeforeDecoder):
    """Features of a tile that are alike are neighbours; each passes its weight to its neighbours, several times.

        A[n, m]   = softmax_m(cos(f[n], f[m]) / temperature) over the m with cos >= threshold
        score     = (norms of the features) . A^hops / degree
        degree[m] = number of n with cos(f[n], f[m]) >= threshold

    Source: G-Prune, arXiv 2501.02268, method section; threshold, temperature and hops are its own and were found on
    another model's features. Nothing was adapted.
    """

    name: ClassVar[str] = "gprune"

    threshold: float = parameter(0.5, -1, 1, "Features are neighbours if their cosine is at least this.")
    temperature: float = parameter(0.03, 0, 10, "Of the softmax over a feature's neighbours.", is_low_open=True)
    hops: int = parameter(5, 1, 64, "Rounds in which features pass weight to their neighbours.")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        is_late = is_broken(image.features, size)
        norms = image.features.norm(dim=1, dtype=torch.float32).view(-1, size).masked_fill(is_late, 0)
        of_tiles = zip(likeness(image.features, size), norms, strict=True)
        scores = torch.stack([self._scores(*tile) for tile in of_tiles]).masked_fill(is_late, torch.nan).flatten()
        return Choice(top(scores, allowance.count(scores)))

    def _scores(self, like: Tensor, norms: Tensor) -> Tensor:
        """Of one tile: likeness [F, F] and norms [F] -> [F]."""
        like.diagonal().fill_(torch.inf)  # its own neighbour, also where rounding or the threshold says otherwise
        are_neighbours = like >= self.threshold
        like.diagonal().fill_(1)
        weights = like.div_(self.temperature).masked_fill_(~are_neighbours, -torch.inf).softmax(dim=1)
        for _ in range(self.hops):
            norms = norms @ weights
        return norms / are_neighbours.sum(dim=0)
