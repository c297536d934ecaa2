"""The policy `mean`: what the text as a whole attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage, top

__all__ = ["Mean"]


@dataclass(frozen=True, slots=True)
class Mean(AfterFirstLayer):
    """Features are ranked by their attention weight, averaged over query heads and text rows.

        score[n] = mean_h mean_t softmax_n(q[h, t] . k[h, n] * scale)

    Unlike `trimmed`, it may drop a feature that only one head needs.

    Source: the baseline that head-wise methods are compared with; no paper of its own.
    """

    name: ClassVar[str] = "mean"

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        scores = image.scores.mean(dim=0)
        return Choice(top(scores, allowance.count(scores)))
