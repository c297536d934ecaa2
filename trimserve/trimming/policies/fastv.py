"""The policy `fastv`: what the last prompt row attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage, top

__all__ = ["FastV"]


@dataclass(frozen=True, slots=True)
class FastV(AfterFirstLayer):
    """Features are ranked by the attention of the last row that sees the image, averaged over query heads.

        score[n] = mean_h softmax_n(q[h, last] . k[h, n] * scale)

    Source: FastV, arXiv 2403.06764, which takes the attention of an early layer and keeps half of the image. Adapted:
    the layer is the first cross-attention layer. There every row sees every feature of its images and positions play
    no part, so the lean towards late features that causal attention gives the original does not arise.
    """

    name: ClassVar[str] = "fastv"

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        scores = image.scores_of(image.rows[-1:]).mean(dim=0)
        return Choice(top(scores, allowance.count(scores)))
