"""The policy `visiondrop`: what the class tokens attend to most, and a few means of the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.merging import Groups
from trimserve.trimming.policies.cls import LAYER, class_attention
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top
from trimserve.trimming.policies.tiles import even_quotas, likeness

__all__ = ["VisionDrop"]


@dataclass(frozen=True, slots=True)
class VisionDrop(BeforeDecoder):
    """Of each tile the *dominant* features stay, and the others are averaged around evenly spaced anchors.

    A tile with quota T keeps its T - C best by class-token attention (`cls` with one layer). Of the others, in order, C
    evenly spaced ones are anchors; each of the rest joins the anchor that it is most like (cosine, tie: the earlier
    one), and every group becomes its mean. C = round(contextual_ratio * T), but at most the number of features that the
    quota leaves out. Every tile has the same quota; a remainder goes to the first tiles.

    Source: VisionDrop, arXiv 2506.22283, whose stage in the encoder is that of VisionZip, arXiv 2412.04467. Adapted:
    features are compared instead of the encoder's keys, and a mean weighs as much as its members did. Left out: its
    stages in the language model, which need attention among visual features; Mllama's decoder has none.
    """

    name: ClassVar[str] = "visiondrop"
    needs: ClassVar[frozenset[Observation]] = frozenset({"class_attention"})

    contextual_ratio: float = parameter(0.125, 0, 1, "Share of what an image holds that are means of other features.")
    layer: int = parameter(0, 0, 1000, LAYER)

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`; the means are part of the budget."""
        size = image.features_per_tile
        scores = class_attention(image, self.layer)
        quotas = even_quotas(allowance.count(scores), image.num_features // size)
        kept, members, sizes = [], [], []
        for tile, (own, like, quota) in enumerate(
            zip(scores.split(size), likeness(image.features, size), quotas, strict=True)
        ):
            num_merged = min(round(self.contextual_ratio * quota), size - quota)
            is_kept = torch.zeros(size, dtype=torch.bool, device=scores.device)
            if quota > num_merged:
                is_kept[top(own, quota - num_merged)] = True
            of_tile, sizes_of_tile = _around_anchors((~is_kept).nonzero()[:, 0], like, num_merged)
            kept.append(tile * size + is_kept.nonzero()[:, 0])
            members.append(tile * size + of_tile)
            sizes.append(sizes_of_tile)
        if not self.contextual_ratio:
            return Choice(torch.cat(kept))
        groups = Groups(torch.cat(members), torch.cat(sizes), (sum(map(len, sizes)),))
        return Choice(torch.cat(kept), groups=groups)


def _around_anchors(places: Tensor, like: Tensor, num_anchors: int) -> tuple[Tensor, Tensor]:
    """Members of the groups, one group after the other, and sizes, int64; without anchors nothing is in a group."""
    if not num_anchors:
        return places[:0], places[:0]
    spaced = torch.arange(num_anchors, device=places.device) * len(places) // num_anchors
    group = like[places[:, None], places[spaced]].argmax(dim=1)
    group[spaced] = torch.arange(num_anchors, device=places.device)
    return places[group.argsort(stable=True)], torch.bincount(group, minlength=num_anchors)
