"""What policies share whose rows a trained compressor makes (`trimming/compressor.py`)."""

from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.compressor import Compressor, Regions
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.merging import Groups
from trimserve.trimming.policies.policy import BeforeDecoder

__all__ = ["Learned"]


class Learned(BeforeDecoder):
    """Class tokens stay, and of each tile's patches a compressor makes as many rows as it was trained for.

    Each new row weighs as much as the patches that it counts for did, like every merged row.
    """

    budgets: ClassVar[tuple[str, ...]] = ()
    knob: ClassVar[str] = "compressor"
    trained: ClassVar[type[Compressor]]

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:  # noqa: ARG002 - it always holds as much
        """See `BeforeDecoder.choose`."""
        return self._made(image, None)

    def choose_for(self, image: EncodedImage, allowance: Allowance, text: Tensor) -> Choice:  # noqa: ARG002 - the same
        """See `BeforeDecoder.choose_for`."""
        return self._made(image, text)

    def _made(self, image: EncodedImage, text: Tensor | None) -> Choice:
        module = image.trained[self.name]
        assert isinstance(module, Compressor)
        tiles = image.features.unflatten(0, (-1, image.features_per_tile))
        with torch.inference_mode():
            rows, group = module(tiles, None if text is None else text.expand(len(tiles), -1))
        first = torch.arange(len(tiles), device=rows.device) * image.features_per_tile
        members = first[:, None] + 1 + group.argsort(dim=1, stable=True)
        sizes = Regions.of(group, module.num_new_rows).is_own.sum(dim=-1).flatten()
        groups = Groups(members.flatten(), sizes, (len(sizes),), rows.flatten(0, 1).to(image.features.dtype))
        return Choice(first, groups=groups)
