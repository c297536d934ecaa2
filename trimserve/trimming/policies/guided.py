"""The policy `guided`: what a smaller model looks at stays for the large one."""

from dataclasses import dataclass
from typing import ClassVar

from trimserve.trimming.policies.policy import Place
from trimserve.trimming.policies.trimmed import Trimmed

__all__ = ["Guided"]


@dataclass(frozen=True, slots=True)
class Guided(Trimmed):
    """A guide, a smaller Mllama, reads the prompt first; what `trimmed` keeps in the guide is kept in the model.

    The guide has the same patch grid. It runs up to its first cross-attention layer, before the model's own decoder
    runs, so all cross-attention layers of the model hold less. `k_ratio` and votes count the guide's heads.

    Source: SGL, arXiv 2412.03324, section on visual token pruning. Adapted: it sums the attention of all layers, heads
    and text rows of the guide, those of the answer that it generates included; here the first cross-attention layer's
    scores choose as in `trimmed`, and nothing is generated. Left out: taking the guide's answer where it is certain
    enough.
    """

    name: ClassVar[str] = "guided"
    place: ClassVar[Place] = Place.IN_GUIDE
    knob: ClassVar[str] = "guide_model"

    def is_asked_after(self, layer: int) -> bool:  # noqa: ARG002 - the guide has chosen before the decoder
        """See `Policy.is_asked_after`."""
        return False
