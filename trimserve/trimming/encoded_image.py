"""One image after the vision encoder: its features, what policies wanted to know, and what they chose of it.

What a policy chooses from the image alone serves every question on it, so it stays with the image. It knows no text.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from trimserve.trimming.feature_kv import FeatureKeyValues
from trimserve.trimming.merging import Groups
from trimserve.trimming.trained import Trained

__all__ = ["MAX_CHOICES", "Choice", "EncodedImage", "Observation"]

Observation = Literal["class_attention", "vision_attention", "vision_states", "patch_entropy"]
"""What a policy may want to know of the image beside its features; nothing is noted that nobody asked for.

class_attention: float32 [L, N], how much the class tokens of the image's tiles attend to each of its features, mean
over class tokens and heads; layer after layer, local ones first.
vision_attention: [2, N, heads, Dh], queries and keys of the last but one local layer.
vision_states: [2, N, width], what enters that layer and what leaves it.
patch_entropy: float32 [N], see `vision_observer.patch_entropy`.
"""

MAX_CHOICES = 4
"""Choices that an image of the server remembers: each is a policy with its parameters and a budget."""

_CHOICE_BYTES = 16  # int64 index of every feature as kept or as a member of a group, and the groups' sizes at most


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one image's features."""

    kept: Tensor
    """int64 [M], ascending; stay as they are."""
    picks: Tensor | None = None
    """int64 [H, K], what each query head picked, -1 where it picked fewer; None if no head was asked or nobody wants to
    know."""
    groups: Groups | None = None
    """What is replaced by the mean of its group; None if the request decides whether the rest is dropped or merged."""


@dataclass(slots=True)
class EncodedImage:
    """Features of one image; shared by the requests that ask about it, and none changes them."""

    features: Tensor
    """[N, hidden_size], real tiles only: tile by tile, the class token first, then the patches row by row."""
    features_per_tile: int
    num_local_layers: int = 0
    """Vision layers before the global ones."""
    observed: dict[Observation, Tensor] = field(default_factory=dict)
    """What was asked for, see `Observation`."""
    prototypes: Tensor | None = None
    """float32 [P, hidden_size], the model's codebook of redundant features, each of length 1; no image owns it."""
    trained: Mapping[str, Trained] = field(default_factory=dict)
    """What the model's policies have learned, by their names; no image owns it."""
    made_bytes: int = 0
    """Set aside for rows that compressors make of the image whatever the question."""
    max_choices: int = MAX_CHOICES
    """How many it remembers."""
    guide: "EncodedImage | None" = None
    """The same image as the model's guide sees it; None until the guide is asked."""
    guide_bytes: int = 0
    """Set aside for it."""
    num_kv_layers: int = 0
    """Cross-attention layers whose keys and values may be kept beside it."""
    kv_layer_bytes: int = 0
    """Of all features in one such layer."""
    keys_values: dict[bytes, FeatureKeyValues] = field(default_factory=dict)
    """By `Adapter.kv_key`, those that the cache has room for; it counts their bytes."""
    _choices: OrderedDict[Hashable, Choice] = field(default_factory=OrderedDict, init=False)

    @property
    def num_features(self) -> int:
        """N."""
        return len(self.features)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but keys and values, with room for the guide's and all choices that it may remember."""
        observed = sum(tensor.nbytes for tensor in self.observed.values())
        choices = self.max_choices * _CHOICE_BYTES * self.num_features + self.made_bytes
        return self.features.nbytes + observed + self.guide_bytes + choices

    def has(self, needs: frozenset[Observation]) -> bool:
        """Whether all of that was observed."""
        return needs <= self.observed.keys()

    def remembered(self, key: Hashable, choose: Callable[[], Choice]) -> Choice:
        """What `choose` answers, asked once for each of the last `max_choices` keys."""
        if key not in self._choices:
            self._choices[key] = choose()
        self._choices.move_to_end(key)
        if len(self._choices) > self.max_choices:
            self._choices.popitem(last=False)
        return self._choices[key]
