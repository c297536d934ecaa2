"""The policy `trimmed`: what any query head looks at most stays."""

from dataclasses import dataclass
from typing import ClassVar

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.headwise import choose_headwise
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage

__all__ = ["Trimmed"]


@dataclass(frozen=True, slots=True)
class Trimmed(AfterFirstLayer):
    """Each query head picks the k features that the text attends to most; the union over the heads is kept.

    k is `k_ratio` of the image's features. A request that asks for a ratio or a count of the image gets the smallest k
    whose union reaches it, capped to it; with `top_p` or the knee every head has a k of its own. A cap keeps more votes
    first, then the higher best score, then the lower index.

    Source: Trimmed Llama, arXiv 2504.00557, method section. What the paper leaves open (rows are averaged, k counts the
    valid features of each image apart, heads are query heads) is decided in `docs/architecture.md`; budgets other than
    k_ratio and the cap are ours.
    """

    name: ClassVar[str] = "trimmed"
    takes_head_ratio: ClassVar[bool] = True
    has_votes: ClassVar[bool] = True

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`; no other policy's choice has picks."""
        return choose_headwise(image, allowance)
