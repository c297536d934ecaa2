"""Which visual features later layers keep: what a request asks for, and what the policy that it names answers.

Policies see one image at a time (`policies/policy.py`); here their answers are put together. This file knows no model.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trimserve.api.trim import FixedCount, FixedRatio, TopP, TrimRequest
from trimserve.trimming.budget import Allowance, HeadRatio, budget, cap
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.merging import Groups, group_dropped
from trimserve.trimming.policies.guided import Guided
from trimserve.trimming.policies.policy import AfterFirstLayer, BeforeDecoder, ExitRule, FirstLayer, Policy
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.policies.trimmed import Trimmed

__all__ = [
    "DEFAULT_RATIO",
    "Selection",
    "TrimPlan",
    "bitmap",
    "choose_from_image",
    "max_rows",
    "scratch_bytes",
    "select",
    "select_again",
]

DEFAULT_RATIO = 0.5
"""Share of an image that a policy before the decoder keeps when the request names no budget."""


@dataclass(frozen=True, slots=True)
class TrimPlan:
    """What a request's trimming comes to."""

    request: TrimRequest

    @property
    def can_drop(self) -> bool:
        """Whether any feature could go; if not, the request takes the untrimmed path, bit for bit."""
        if not self.request.enabled:
            return False
        policy = self.make_policy()
        if (
            (self.request.max_kept_fraction or 1) < 1
            or not policy.budgets
            or policy.is_cascade
            or policy.exit_rule is not None
        ):
            return True
        match self.allowance.budget:
            case HeadRatio(ratio) | FixedRatio(ratio) | TopP(ratio):
                return ratio < 1
            case _:
                return True

    @property
    def is_before_decoder(self) -> bool:
        """Whether features are chosen from the images alone."""
        return self.can_drop and issubclass(POLICIES[self.request.policy], BeforeDecoder)

    @property
    def is_after_first_layer(self) -> bool:
        """Whether features are chosen in the first cross-attention layer."""
        return self.can_drop and issubclass(POLICIES[self.request.policy], AfterFirstLayer) and not self.is_guided

    @property
    def is_guided(self) -> bool:
        """Whether features are chosen in the first cross-attention layer of a guide, before the decoder."""
        return self.can_drop and issubclass(POLICIES[self.request.policy], Guided)

    @property
    def is_cascade(self) -> bool:
        """Whether later cross-attention layers choose again, among what is kept."""
        return self.request.enabled and self.make_policy().is_cascade

    @property
    def exit_rule(self) -> ExitRule | None:
        """When later cross-attention layers are left out; None: never."""
        return self.make_policy().exit_rule if self.request.enabled else None

    @property
    def allowance(self) -> Allowance:
        """How many features of an image may stay, or how many each head may pick."""
        is_before = issubclass(POLICIES[self.request.policy], BeforeDecoder)
        asked = self.request.budget or (FixedRatio(DEFAULT_RATIO) if is_before else HeadRatio(self.request.k_ratio))
        return Allowance(asked, self.request.max_kept_fraction)

    @property
    def needs(self) -> frozenset[Observation]:
        """What the policy wants to know of the vision layers."""
        return POLICIES[self.request.policy].needs if self.can_drop else frozenset()

    @property
    def choice_key(self) -> Hashable:
        """All that a choice before the decoder depends on beside the image."""
        return self.make_policy(), self.allowance, self.request.merge_ratio

    def make_policy(self) -> Policy:
        """The policy with its parameters."""
        return POLICIES[self.request.policy](**self.request.parameters)


@dataclass(frozen=True, slots=True)
class Selection:
    """Kept features of one request's images."""

    kept: Tensor
    """int64 [M], ascending over the features of all images in order."""
    num_kept: tuple[int, ...]
    """Kept features of each image; sums to M."""
    picks: Tensor
    """int64 [H, K], what each query head picked, -1 where it picked fewer; [0, 0] where no head was asked or nobody
    wants to know."""
    groups: Groups | None = None
    """What is merged; None: what is not kept is dropped."""

    @classmethod
    def of(cls, choices: Sequence[Choice], num_features: Sequence[int]) -> "Selection":
        """Put the choices of a request's images, at least one, together.

        Args:
            choices: of one policy, one for each image.
            num_features: of each image.
        """
        starts = [0, *accumulate(num_features)][:-1]
        placed = list(zip(choices, starts, strict=True))
        kept = torch.cat([start + choice.kept for choice, start in placed])
        by_head = [
            torch.where(each.picks < 0, -1, start + each.picks) for each, start in placed if each.picks is not None
        ]
        groups = [(each.groups, start) for each, start in placed if each.groups is not None]
        return cls(
            kept,
            tuple(len(choice.kept) for choice in choices),
            torch.cat(by_head, dim=1) if by_head else kept.new_empty((0, 0)),
            Groups.of(groups) if groups else None,
        )


def max_rows(num_features: int, num_heads: int, features_per_tile: int, trim: TrimPlan) -> int:
    """Most rows that an image can hold after selection; at most `num_features`.

    Args:
        num_features: valid features of the image, at least 1.
        num_heads: H.
        features_per_tile: of the model.
        trim: of the request.
    """
    if not trim.can_drop:
        return num_features
    match trim.allowance.budget if POLICIES[trim.request.policy].budgets else None:
        case HeadRatio(ratio) if not trim.is_guided:  # by a guide's heads, of which it may have more
            kept = num_heads * budget(ratio, num_features)
        case FixedRatio(ratio):
            kept = budget(ratio, num_features)
        case FixedCount(count):
            kept = count
        case _:
            kept = num_features
    kept = min(kept, cap(trim.request.max_kept_fraction, num_features))
    if trim.request.merge_ratio:
        kept += num_features // features_per_tile * budget(trim.request.merge_ratio, features_per_tile)
    return min(kept, num_features)


def scratch_bytes(num_tiles: int, features_per_tile: int, hidden_size: int) -> int:
    """Most bytes that choosing from one image takes for a while, and merging what is not kept.

    A policy that compares features holds their likeness within each tile, [tiles, F, F]; merging holds what it
    averages, twice at most. Both are float32, as is a tile of features on its way.

    Args:
        num_tiles: of the image.
        features_per_tile: F.
        hidden_size: of a feature.
    """
    likeness = num_tiles * features_per_tile**2
    directions = 2 * num_tiles * features_per_tile * hidden_size
    return 4 * (likeness + directions)


def select(layer: FirstLayer, trim: TrimPlan) -> Selection:
    """Choose the features of each image that later layers keep, after the first cross-attention layer.

    Args:
        layer: what it knows of the images, at least one.
        trim: names a policy that is asked there.
    """
    policy = trim.make_policy()
    assert isinstance(policy, AfterFirstLayer)
    choices = []
    for image in layer.images():
        allowance = trim.allowance
        if isinstance(allowance.budget, HeadRatio) and not isinstance(policy, Trimmed):
            allowance = Allowance(FixedCount(len(Trimmed().choose(image, allowance).kept)))
        choices.append(policy.choose(image, allowance))
    selection = Selection.of(choices, layer.num_features)
    if selection.groups is not None or not trim.request.merge_ratio:
        return selection
    size = layer.features_per_tile
    groups = group_dropped(layer.keys, selection.kept, layer.num_features, size, trim.request.merge_ratio)
    return replace(selection, groups=groups)


def select_again(layer: FirstLayer, trim: TrimPlan) -> Selection:
    """Choose among the features that are kept of each image, in a later cross-attention layer.

    Args:
        layer: what it knows of the images, at least one, and of each the features that are kept until here.
        trim: names a cascade.
    """
    policy = trim.make_policy()
    assert isinstance(policy, AfterFirstLayer)
    return Selection.of([Choice(policy.choose_again(image)) for image in layer.images()], layer.num_features)


def choose_from_image(image: EncodedImage, trim: TrimPlan) -> Choice:
    """Choose the features of one image that the decoder gets; an image that was asked before remembers.

    Args:
        image: of which the policy's `needs` were observed.
        trim: names a policy that is asked before the decoder.
    Returns:
        A choice whose groups are what is merged; None: the rest is dropped.
    """
    policy, allowance = trim.make_policy(), trim.allowance
    assert isinstance(policy, BeforeDecoder)

    def choose() -> Choice:
        choice = policy.choose(image, allowance)
        if choice.groups is not None or not trim.request.merge_ratio:
            return choice
        features, counts = image.features[:, None], (image.num_features,)
        groups = group_dropped(features, choice.kept, counts, image.features_per_tile, trim.request.merge_ratio)
        return replace(choice, groups=groups)

    return image.remembered(trim.choice_key, choose)


def bitmap(indices: Tensor, num_features: int) -> bytes:
    """Pack indices in [0, num_features) into bits, least significant first.

    >>> bitmap(torch.tensor([0, 9]), 10).hex()
    '0102'
    """
    bits = np.zeros(num_features, dtype=bool)
    bits[indices.cpu().numpy()] = True
    return np.packbits(bits, bitorder="little").tobytes()
