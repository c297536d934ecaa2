"""The policy `pool`: the mean of every 2 x 2 patches."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.merging import Groups
from trimserve.trimming.policies.policy import BeforeDecoder

__all__ = ["Pool"]


@dataclass(frozen=True, slots=True)
class Pool(BeforeDecoder):
    """Class tokens stay; of every tile, blocks of 2 x 2 patches become one row each, at an odd edge smaller blocks.

    The training-free stand-in for compressors that are trained (TokenPacker, WiCo, FlashSloth, QueCC). A row weighs as
    much as its patches did, like every merged row. It always keeps the same share of an image, so it takes no budget.
    """

    name: ClassVar[str] = "pool"
    budgets: ClassVar[tuple[str, ...]] = ()

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:  # noqa: ARG002 - it always keeps as much
        """See `BeforeDecoder.choose`."""
        size, device = image.features_per_tile, image.features.device
        side, num_tiles = isqrt(size - 1), image.num_features // size
        tiles = torch.arange(num_tiles, device=device) * size
        places = torch.arange(side * side, device=device)
        block = places // side // 2 * ((side + 1) // 2) + places % side // 2
        members = 1 + block.argsort(stable=True)
        sizes = torch.bincount(block)
        groups = Groups((tiles[:, None] + members).flatten(), sizes.repeat(num_tiles), (num_tiles * len(sizes),))
        return Choice(tiles, groups=groups)
