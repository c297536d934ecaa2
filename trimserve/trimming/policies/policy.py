"""What a policy is: where it is asked, what it sees, what it answers.

A policy is a frozen dataclass; its fields are the parameters that a request may set. It chooses first in one of three
places (`Place`): *before the decoder*, from each image alone, so that the first cross-attention layer shrinks too and
the answer serves every question on the image; *after cross-attention layers*, by what the text attends to, mostly after
the first one only; or *in a guide*, after the first cross-attention layer of a smaller model. It may be asked again
after later layers. A policy sees one image at a time, and real tiles only.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, field, fields
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from trimserve import ops
from trimserve.api.info import ParameterInfo, PolicyInfo
from trimserve.api.trim import FixedCount
from trimserve.trimming.budget import Allowance, HeadRatio
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.policies.headwise import choose_headwise
from trimserve.trimming.policies.view import CrossAttentionView, SeenImage
from trimserve.trimming.trained import Trained

__all__ = [
    "AfterFirstLayer",
    "BeforeDecoder",
    "Choice",
    "CrossAttentionView",
    "Place",
    "Policy",
    "SeenImage",
    "Verdict",
    "parameter",
    "top",
]


class Place(Enum):
    """Where a policy chooses features."""

    BEFORE_DECODER = "before the decoder"
    IN_GUIDE = "in the guide"
    AFTER_LAYERS = "after cross-attention layers"


class Verdict(Enum):
    """What a policy may answer after a cross-attention layer instead of a choice."""

    KEEP_ALL = "keep all"
    """The next layer holds what this one held."""
    LEAVE = "leave"
    """Later cross-attention layers are skipped and hold nothing."""


class Policy(ABC):
    """One way to choose, with its parameters."""

    name: ClassVar[str]
    """What requests call it."""
    place: ClassVar[Place]
    """Where it chooses."""
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count", "top_p", "knee")
    """Kinds of budget that it takes."""
    needs: ClassVar[frozenset[Observation]] = frozenset()
    """What it wants to know of the vision layers."""
    knob: ClassVar[str] = ""
    """Knob of `ModelConfig` without which it cannot be asked; empty if it needs none."""
    trained: ClassVar[type[Trained] | None] = None
    """What it has to learn; None if it chooses by a formula."""
    reads_text: ClassVar[bool] = False
    """Whether it looks at the question although it is asked before the decoder."""
    has_votes: ClassVar[bool] = False
    """Whether its choices tell what each head picked."""

    @property
    def trims_later_layers(self) -> bool:
        """Whether later cross-attention layers may hold less than the first one, whatever the budget."""
        return False

    def is_asked_after(self, layer: int) -> bool:  # noqa: ARG002 - most policies are asked after no layer
        """Whether `after_layer` is called after this cross-attention layer, counted from 0."""
        return False

    def after_layer(self, view: CrossAttentionView, allowance: Allowance) -> list[Choice] | Verdict:
        """Answer the one hook: what later cross-attention layers hold of what this one held.

        Args:
            view: what the layer computed.
            allowance: how many features of an image may stay.
        Returns:
            A choice for each image, or a verdict on all of them.
        """
        raise NotImplementedError(f"{self.name} is not asked after layer {view.layer}")

    @classmethod
    def describe(cls, *, is_available: bool = True) -> PolicyInfo:
        """Describe the policy for people; the summary is the first sentence of its docstring.

        Args:
            is_available: whether its `knob` is set.
        """
        own: Sequence[Field[float]] = fields(cls)  # type: ignore[arg-type]  # every policy is a dataclass
        is_before = cls.place is Place.BEFORE_DECODER
        return PolicyInfo(
            name=cls.name,
            summary=" ".join((cls.__doc__ or "").split("\n\n")[0].split()),
            is_before_decoder=is_before,
            needs=tuple(sorted(cls.needs)) if is_before and not cls.reads_text else ("text",),
            budgets=cls.budgets,
            parameters=tuple(ParameterInfo(name=each.name, default=each.default, **each.metadata) for each in own),  # type: ignore[arg-type]  # every parameter has a default
            knob=cls.knob,
            is_available=is_available,
        )


class AfterFirstLayer(Policy):
    """A policy that chooses by what the first cross-attention layer of the decoder computes."""

    place: ClassVar[Place] = Place.AFTER_LAYERS
    takes_head_ratio: ClassVar[bool] = False
    """Whether `choose` takes a `HeadRatio`; others get the number of features that head-wise picks come to."""

    @abstractmethod
    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """Choose the features of one image that later layers keep."""

    def is_asked_after(self, layer: int) -> bool:
        """See `Policy.is_asked_after`."""
        return layer == 0

    def after_layer(self, view: CrossAttentionView, allowance: Allowance) -> list[Choice] | Verdict:
        """See `Policy.after_layer`."""
        return [self.choose(image, self._counted(image, allowance)) for image in view.images()]

    def _counted(self, image: SeenImage, allowance: Allowance) -> Allowance:
        if self.takes_head_ratio or not isinstance(allowance.budget, HeadRatio):
            return allowance
        return Allowance(FixedCount(len(choose_headwise(image, allowance).kept)))


class BeforeDecoder(Policy):
    """A policy that chooses from the image alone, before the decoder; its choice serves every question on the image."""

    place: ClassVar[Place] = Place.BEFORE_DECODER

    @abstractmethod
    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """Choose the features of one image that the decoder gets."""

    def choose_for(self, image: EncodedImage, allowance: Allowance, text: Tensor) -> Choice:  # noqa: ARG002 - most read none
        """Choose for one question, if it `reads_text`.

        Args:
            image: see `choose`.
            allowance: see `choose`.
            text: float32 [D], mean embedding of the prompt's tokens from the image on.
        """
        return self.choose(image, allowance)


def parameter(
    default: float, low: float, high: float, description: str, *, is_low_open: bool = False
) -> Any:  # a dataclass field, which a type checker takes for its value
    """Declare a parameter of a policy.

    Args:
        default: an int makes it a whole number.
        low: the least value.
        high: the largest value.
        description: one sentence for people who set it.
        is_low_open: whether `low` itself is out of range.
    """
    bounds = {"low": low, "high": high, "is_low_open": is_low_open}
    return field(default=default, metadata={"description": description, **bounds})


def top(scores: Tensor, count: int) -> Tensor:
    """The features with the largest scores, ascending; tie: lower index, NaN last.

    Args:
        scores: float [N].
        count: in [1, N].
    Returns:
        int64 [count].
    """
    return ops.headwise_topk(scores.float()[None], [len(scores)], [count])[0]
