"""The policy `codebook`: features that are least like known redundant ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.policies.policy import BeforeDecoder, top
from trimserve.trimming.policies.tiles import directions, is_broken

__all__ = ["Codebook"]


@dataclass(frozen=True, slots=True)
class Codebook(BeforeDecoder):
    """Features that are least like the prototypes of redundant ones stay.

        score[n] = 1 - max_p cos(f[n], prototype[p])

    The prototypes are found once for a model, see `evaluation/redundancy.py`.

    Source: Beyond Intermediate States, arXiv 2503.20540. Adapted: the paper keeps every feature below a cosine
    threshold, which differs from model to model; here a budget says how many stay.
    """

    name: ClassVar[str] = "codebook"
    knob: ClassVar[str] = "codebook"

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        assert image.prototypes is not None, "requests name it only where there is a codebook"
        size, prototypes = image.features_per_tile, image.prototypes
        closest = [(directions(tile) @ prototypes.T).amax(dim=1) for tile in image.features.split(size)]
        scores = (1 - torch.cat(closest)).masked_fill(is_broken(image.features, size).flatten(), torch.nan)
        return Choice(top(scores, allowance.count(scores)))
