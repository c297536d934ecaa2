"""The policy `cls`: what the class tokens of the vision encoder attend to most."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top

__all__ = ["Cls", "class_attention", "vision_layer"]

LAYER = "Vision layer, counted from 1, local layers first; 0 is the last local layer but one."


@dataclass(frozen=True, slots=True)
class Cls(BeforeDecoder):
    """Features are ranked by the attention of the class tokens, summed over vision layers.

        score[n] = sum_{l = layer - num_layers + 1 .. layer} mean_h mean_c softmax_n(q[l, h, c] . k[l, h, n] * scale)

    over the class tokens c of the image's tiles. A class token itself scores as the best patch of its tile.

    Source: VTC-CLS, arXiv 2412.05819; with one layer FasterVLM, arXiv 2412.01818, first version. Adapted: the tiles of
    an image are one sequence in Mllama's encoder and have a class token each, so the mean of them is taken; class
    tokens are features that the decoder reads, too.
    """

    name: ClassVar[str] = "cls"
    needs: ClassVar[frozenset[Observation]] = frozenset({"class_attention"})

    layer: int = parameter(0, 0, 1000, LAYER)
    num_layers: int = parameter(4, 1, 1000, "Layers that are summed, up to `layer`.")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        scores = class_attention(image, self.layer, self.num_layers)
        return Choice(top(scores, allowance.count(scores)))


def class_attention(image: EncodedImage, layer: int, num_layers: int = 1) -> Tensor:
    """Attention of the class tokens, float32 [N], summed over layers.

    Args:
        image: whose `class_attention` was observed.
        layer: the last of them; see `LAYER`. One that the model does not have is its last.
        num_layers: those before the first are left out.
    """
    observed = image.observed["class_attention"]
    last = vision_layer(image, layer, len(observed))
    scores = observed[max(0, last + 1 - num_layers) : last + 1].sum(dim=0).view(-1, image.features_per_tile)
    scores[:, 0] = scores[:, 1:].amax(dim=1)
    return scores.flatten()


def vision_layer(image: EncodedImage, layer: int, num_layers: int) -> int:
    """A layer's index from 0, by the rule of `LAYER`."""
    return min(layer, num_layers) - 1 if layer else max(0, image.num_local_layers - 2)
