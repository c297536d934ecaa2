"""What policies share whose rows a trained compressor makes (`trimming/compressor.py`)."""

from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.merging import Groups
from trimserve.trimming.policies.policy import BeforeDecoder

__all__ = ["Learned"]


class Learned(BeforeDecoder):
    """Class tokens stay, and of an image's patches a compressor makes as many rows as it was trained for.

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
        size = image.features_per_tile
        tiles = image.features.unflatten(0, (-1, size))
        with torch.inference_mode():
            (rows,), (group,) = module(tiles[None], None if text is None else text[None])
        places = torch.arange(image.num_features, device=group.device).view(-1, size)
        members = places[:, 1:].flatten()[group.argsort(stable=True)]
        groups = Groups(members, torch.bincount(group), (len(rows),), rows.to(image.features.dtype))
        return Choice(places[:, 0], groups=groups)
