"""What a policy is: where it is asked, what it sees of an image, what it answers.

A policy is a frozen dataclass; its fields are the parameters that a request may set. There are two places to ask one:
*before the decoder*, from the image alone, so that the first cross-attention layer shrinks too and the answer serves
every question on the image; and *after the first cross-attention layer*, when the text has looked. Either way a policy
sees one image at a time, and of it real tiles only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor

from trimserve import ops
from trimserve.api.info import ParameterInfo, PolicyInfo
from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation

__all__ = [
    "AfterFirstLayer",
    "BeforeDecoder",
    "Choice",
    "ExitRule",
    "FirstLayer",
    "Policy",
    "SeenImage",
    "parameter",
    "top",
]


ExitRule = Callable[[Tensor, Tensor], bool]
"""Of one prompt's rows that see an image, [S, D], and what a cross-attention layer's attention adds to them, [S, D]:
whether they have seen enough."""


class Policy(ABC):
    """Parameters of one way to choose."""

    name: ClassVar[str]
    """What requests call it."""
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count", "top_p", "knee")
    """Kinds of budget that it takes."""
    needs: ClassVar[frozenset[Observation]] = frozenset()
    """What it wants to know of the vision layers."""
    knob: ClassVar[str] = ""
    """Knob of `ModelConfig` without which it cannot be asked; empty: none."""

    @property
    def exit_rule(self) -> ExitRule | None:
        """Asked in a prefill after each cross-attention layer; the request goes without those after the first yes."""
        return None

    @property
    def is_cascade(self) -> bool:
        """Whether later cross-attention layers choose again, among what is kept (`AfterFirstLayer.choose_again`)."""
        return False

    @classmethod
    def describe(cls, *, is_available: bool = True) -> PolicyInfo:
        """What people may want to know of it; its summary is the first sentence of its docstring.

        Args:
            is_available: whether its `knob` is set.
        """
        own: Sequence[Field[float]] = fields(cls)  # type: ignore[arg-type]  # every policy is a dataclass
        is_before = issubclass(cls, BeforeDecoder)
        return PolicyInfo(
            name=cls.name,
            summary=" ".join((cls.__doc__ or "").split("\n\n")[0].split()),
            is_before_decoder=is_before,
            needs=tuple(sorted(cls.needs)) if is_before else ("text",),
            budgets=cls.budgets,
            parameters=tuple(ParameterInfo(name=each.name, default=each.default, **each.metadata) for each in own),  # type: ignore[arg-type]  # every parameter has a default
            knob=cls.knob,
            is_available=is_available,
        )


class AfterFirstLayer(Policy):
    """A policy that chooses by what the first cross-attention layer of the decoder knows."""

    @abstractmethod
    def choose(self, image: "SeenImage", allowance: Allowance) -> Choice:
        """Choose the features of one image that later layers keep."""

    def choose_again(self, image: "SeenImage") -> Tensor:
        """Choose among the features that a later cross-attention layer sees of one image; int64 [M], ascending."""
        raise NotImplementedError(f"{self.name} does not choose again")


class BeforeDecoder(Policy):
    """A policy that chooses from the image alone, before the decoder; its choice serves every question on the image."""

    @abstractmethod
    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """Choose the features of one image that the decoder gets."""


class FirstLayer:
    """What the first cross-attention layer knows of one request's images; in a cascade a later one, of what is kept."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        features: Tensor,
        visibility: Tensor,
        scale: float,
        num_features: Sequence[int],
        features_per_tile: int,
        wants_picks: bool = True,
    ) -> None:
        """Compute nothing yet.

        Args:
            queries: [S, H, Dh] of the rows that see an image.
            keys: [N, Hkv, Dh].
            features: [N, D].
            visibility: int32 [S, 2], the range of features that a row sees.
            scale: factor of the logits.
            num_features: of each image; they sum to N.
            features_per_tile: tiles follow each other.
            wants_picks: whether a choice should tell what each head picked, where heads are asked.
        """
        self.wants_picks = wants_picks
        self.queries, self.keys, self.features = queries, keys, features
        self.visibility, self.scale = visibility, scale
        self.num_features, self.features_per_tile = tuple(num_features), features_per_tile

    @cached_property
    def scores(self) -> Tensor:
        """float32 [H, N], see `ops.headwise_scores`."""
        return ops.headwise_scores(self.queries, self.keys, self.visibility, self.scale)

    def scores_of(self, rows: Tensor) -> Tensor:
        """The same over some rows, int64 [R], only."""
        visibility = self.visibility[rows.to(self.visibility.device)]
        return ops.headwise_scores(self.queries[rows], self.keys, visibility, self.scale)

    def images(self) -> list["SeenImage"]:
        """One by one, in order."""
        ends = list(accumulate(self.num_features))
        return [SeenImage(self, index, ends[index] - n, n) for index, n in enumerate(self.num_features)]


@dataclass(frozen=True, slots=True)
class SeenImage:
    """One image as the first cross-attention layer sees it."""

    layer: FirstLayer
    index: int
    """Among the request's images."""
    start: int
    """Where its features begin."""
    num_features: int
    """n, at least 1."""

    @property
    def features_per_tile(self) -> int:
        """Features of one tile, its class token first."""
        return self.layer.features_per_tile

    @property
    def scores(self) -> Tensor:
        """float32 [H, n], attention of each query head, mean over the rows that see the image."""
        return self.layer.scores[:, self._own]

    @property
    def features(self) -> Tensor:
        """[n, D]."""
        return self.layer.features[self._own]

    @property
    def keys(self) -> Tensor:
        """[n, Hkv, Dh]."""
        return self.layer.keys[self._own]

    @property
    def rows(self) -> Tensor:
        """int64 [R], ascending, the rows that see the image."""
        first, end = self.layer.visibility.unbind(dim=1)
        return ((first <= self.start) & (self.start < end)).nonzero()[:, 0].to(self.layer.queries.device)

    def scores_of(self, rows: Tensor) -> Tensor:
        """float32 [H, n], the mean over some rows, int64 [R], that see the image."""
        return self.layer.scores_of(rows)[:, self._own]

    @property
    def _own(self) -> slice:
        return slice(self.start, self.start + self.num_features)


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
