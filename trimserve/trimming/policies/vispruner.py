"""The policy `vispruner`: half by the class tokens' attention, half by leaving out duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.policies.cls import LAYER, class_attention
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top
from trimserve.trimming.policies.tiles import even_quotas, likeness

__all__ = ["VisPruner"]

_LEAST_DROPPED = 8
_DROPPED_SHARE = 16


@dataclass(frozen=True, slots=True)
class VisPruner(BeforeDecoder):
    """Of each tile the features that the class tokens attend to most, and of the others those that are not alike.

    A tile with quota T keeps its round(important_ratio * T) best by class-token attention (`cls` with one layer). The
    others are thinned out until only the rest of the quota is left. Each round takes those that remain in order,
    compares the ones at even places with the ones at odd places, and drops the even ones that are most like any odd one
    (cosine): 8, or a 16th of what remains if that is more. Every tile has the same quota; a remainder goes to the first
    tiles.

    Source: VisPruner, arXiv 2412.01818, method section. Adapted: it drops 8 at a time, which is too many rounds for
    1601 features of a tile, hence the 16th; and the class token is a feature and scores as the tile's best patch.
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[Observation]] = frozenset({"class_attention"})

    important_ratio: float = parameter(0.5, 0, 1, "Share of what is kept that is chosen by attention.")
    layer: int = parameter(0, 0, 1000, LAYER)

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        scores = class_attention(image, self.layer)
        quotas = even_quotas(allowance.count(scores), image.num_features // size)
        tiles = zip(scores.split(size), likeness(image.features, size), quotas, strict=True)
        kept = [tile * size + self._choose(*each) for tile, each in enumerate(tiles)]
        return Choice(torch.cat(kept))

    def _choose(self, scores: Tensor, like: Tensor, quota: int) -> Tensor:
        """Of one tile, int64 [quota], ascending."""
        num_important = round(self.important_ratio * quota)
        is_kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if num_important:
            is_kept[top(scores, num_important)] = True
        is_kept[_thinned((~is_kept).nonzero()[:, 0], like, quota - num_important)] = True
        return is_kept.nonzero()[:, 0]


def _thinned(places: Tensor, like: Tensor, wanted: int) -> Tensor:
    """Drop duplicates among `places` until only `wanted` are left."""
    if not wanted:
        return places[:0]
    while len(places) > wanted:
        even, odd = places[::2], places[1::2]
        closest = like[even[:, None], odd].amax(dim=1)
        most = max(_LEAST_DROPPED, len(places) // _DROPPED_SHARE)
        dropped = top(closest, min(most, len(places) - wanted, len(even)))
        is_left = torch.ones(len(places), dtype=torch.bool, device=places.device)
        is_left[2 * dropped] = False
        places = places[is_left]
    return places
