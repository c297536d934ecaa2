"""The policy `guided`: what a smaller model looks at stays for the large one."""

from dataclasses import dataclass
from typing import ClassVar

from trimserve.trimming.policies.policy import Place
from trimserve.trimming.policies.trimmed import Trimmed

__all__ = ["Guided"]


@dataclass(frozen=True, slots=True)
class Guided(Trimmed):
    """A guide, a small Mllama of the same patch grid, reads the prompt first; what `trimmed` keeps in it is kept.

    The guide runs up to its first cross-attention layer and is asked there. That is before the decoder of the large
    model, all of whose cross-attention layers hold less then. Heads, and so `k_ratio` and votes, are the guide's.

    Source: SGL, arXiv 2412.03324, section on visual token pruning. Adapted: it sums the attention of all layers, heads
    and text rows of the guide, those of the answer that it generates included; here the first cross-attention layer's
    scores choose as in `trimmed`, and nothing is generated. Left out: to stop at the guide's answer where that is
    certain enough.
    """

    name: ClassVar[str] = "guided"
    place: ClassVar[Place] = Place.IN_GUIDE
    knob: ClassVar[str] = "guide_model"

    def is_asked_after(self, layer: int) -> bool:  # noqa: ARG002 - the guide has chosen before the decoder
        """See `Policy.is_asked_after`."""
        return False
