"""The policy `topv`: inputs of a vision layer that contribute most to its output, by optimal transport."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top
from trimserve.trimming.policies.tiles import is_broken, likeness

__all__ = ["TopV"]


@dataclass(frozen=True, slots=True)
class TopV(BeforeDecoder):
    """Features are ranked by what they contribute to a vision layer's output, an optimal transport.

        cost[m, n]  = 1 - cos(x[m], y[n]) + spatial_weight |p[m] - p[n]| + central_weight |p[m] - centre|
        weight      = exp(-cost / transport_temperature)
        P           = u[m] weight[m, n] v[n], u and v by Sinkhorn: v so that every target gets 1, then u so that every
                      source gives 1, and so on; it ends with v
        score[m]    = sum_n P[m, n]

    Sources x enter the last but one local vision layer, targets y leave it; p is a patch's place, a tile is 1 wide, and
    the class token is at its centre. `recovered_ratio` of what is kept are evenly spaced features of the rest.

    Source: TopV, arXiv 2503.18278, optimization and recovery. Adapted: the paper asks a layer of the language model;
    Mllama's decoder does not transform visual features, so a vision layer stands in; features are compared within their
    tile. Not known: the paper's weights, temperature, number of rounds and share of recovered features; the defaults
    are ours. The more rounds, the more alike the scores: in the end every source gives 1.
    """

    name: ClassVar[str] = "topv"
    needs: ClassVar[frozenset[Observation]] = frozenset({"vision_states"})

    spatial_weight: float = parameter(0.5, 0, 100, "Of the distance between source and target, in tiles.")
    central_weight: float = parameter(0.1, 0, 100, "Of a source's distance from the tile's centre, in tiles.")
    recovered_ratio: float = parameter(0.1, 0, 1, "Share of what is kept that is evenly spaced over the rest.")
    rounds: int = parameter(3, 1, 100, "Of Sinkhorn's algorithm.")
    transport_temperature: float = parameter(0.1, 0.01, 100, "The lower, the fewer sources a target has.")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size, (sources, targets) = image.features_per_tile, image.observed["vision_states"]
        scores = self._scores(likeness(sources, size, targets)).flatten()
        scores.masked_fill_(is_broken(image.features, size).flatten(), torch.nan)
        count = allowance.count(scores)
        num_recovered = int(self.recovered_ratio * count)
        is_kept = torch.zeros_like(scores, dtype=torch.bool)
        if count > num_recovered:
            is_kept[top(scores, count - num_recovered)] = True
        rest = (~is_kept).nonzero()[:, 0]
        if num_recovered:
            steps = torch.arange(num_recovered, device=rest.device)
            is_kept[rest[(2 * steps + 1) * len(rest) // (2 * num_recovered)]] = True
        return Choice(is_kept.nonzero()[:, 0])

    def _scores(self, like: Tensor) -> Tensor:
        """Likeness of sources and targets [tiles, F, F], changed in place -> [tiles, F]."""
        places = _places(like.shape[1], like.device)
        cost = like.neg_().add_(self.spatial_weight * torch.cdist(places, places))
        cost += self.central_weight * places.norm(dim=1, keepdim=True)
        cost -= cost.amin(dim=1, keepdim=True)  # v takes it up again; each target has a weight of 1
        weights = cost.div_(-self.transport_temperature).exp_()
        least = torch.finfo(weights.dtype).tiny
        given = u = torch.ones_like(weights[..., 0])
        for _ in range(self.rounds):
            u = u / given.clamp(min=least)
            v = (u[:, None] @ weights).clamp(min=least).reciprocal()
            given = u * (weights @ v.mT)[..., 0]
        return given


def _places(size: int, device: torch.device) -> Tensor:
    """Where the features of a tile are, seen from its centre, in tiles; float32 [F, 2]."""
    side = isqrt(size - 1)
    along = (torch.arange(side, device=device) + 0.5) / side - 0.5
    return torch.cat([along.new_zeros(1, 2), torch.cartesian_prod(along, along)])
