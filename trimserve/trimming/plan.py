"""A request's trimming, resolved once: which policy is asked, where, and how much may stay.

Policies see one image at a time (`policies/policy.py`); here their answers are put together. This file knows no model,
and no policy by name.
"""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from trimserve.api.trim import FixedCount, FixedRatio, TopP, TrimRequest
from trimserve.trimming.budget import Allowance, HeadRatio, budget, cap
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.merging import group_dropped
from trimserve.trimming.policies.policy import BeforeDecoder, CrossAttentionView, Place, Policy, Verdict
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.selection import Selection

__all__ = ["DEFAULT_RATIO", "TrimPlan", "bitmap", "choose_from_image", "max_rows", "scratch_bytes", "select"]

DEFAULT_RATIO = 0.5
"""Share of an image that a policy before the decoder keeps when the request names no budget."""


@dataclass(frozen=True, slots=True)
class TrimPlan:
    """What a request's trimming comes to; made once per request, plain data that can be pickled."""

    policy: Policy | None
    """None if nothing can be dropped: the request takes the untrimmed path, bit for bit."""
    allowance: Allowance
    """How many features of an image may stay, or how many each head may pick."""
    merge_ratio: float = 0.0
    """See `TrimRequest.merge_ratio`."""
    return_selection: bool = False
    """Whether the answer says which features were kept, and what each head picked."""

    @classmethod
    def of(cls, request: TrimRequest) -> "TrimPlan":
        """Resolve what a request asks for."""
        policy = POLICIES[request.policy](**request.parameters)
        is_before = policy.place is Place.BEFORE_DECODER
        asked = request.budget or (FixedRatio(DEFAULT_RATIO) if is_before else HeadRatio(request.k_ratio))
        allowance = Allowance(asked, request.max_kept_fraction)
        can_drop = request.enabled and _can_drop(policy, allowance)
        return cls(policy if can_drop else None, allowance, request.merge_ratio, request.return_selection)

    @property
    def place(self) -> Place | None:
        """Where features are chosen; None if nothing can be dropped."""
        return None if self.policy is None else self.policy.place

    @property
    def needs(self) -> frozenset[Observation]:
        """What the policy wants to know of the vision layers."""
        return frozenset() if self.policy is None else self.policy.needs

    @property
    def reads_text(self) -> bool:
        """Whether the policy looks at the question before the decoder."""
        return self.policy is not None and self.policy.reads_text

    def is_asked_after(self, layer: int) -> bool:
        """Whether `after_layer` is to be called after a cross-attention layer, counted from 0."""
        return self.policy is not None and self.policy.is_asked_after(layer)

    def after_layer(self, view: CrossAttentionView) -> Selection | Verdict:
        """Ask the policy what later cross-attention layers hold of what this one held.

        Args:
            view: what the layer computed from the images, at least one.
        Returns:
            What is kept, with the groups that are merged beside it; or a verdict.
        """
        assert self.policy is not None
        choices = self.policy.after_layer(view, self.allowance)
        if isinstance(choices, Verdict):
            return choices
        selection = Selection.of(choices, view.num_features)
        if selection.groups is not None or not self.merge_ratio or view.layer > 0:  # only the first layer merges
            return selection
        size = view.features_per_tile
        groups = group_dropped(view.keys, selection.kept, view.num_features, size, self.merge_ratio)
        return replace(selection, groups=groups)


def _can_drop(policy: Policy, allowance: Allowance) -> bool:
    if (allowance.max_fraction or 1) < 1 or not policy.budgets or policy.trims_later_layers:
        return True
    match allowance.budget:
        case HeadRatio(ratio) | FixedRatio(ratio) | TopP(ratio):
            return ratio < 1
        case _:
            return True


def select(view: CrossAttentionView, plan: TrimPlan) -> Selection:
    """Choose the features of each image after a first cross-attention layer; for policies that always choose there."""
    selection = plan.after_layer(view)
    assert isinstance(selection, Selection)
    return selection


def choose_from_image(image: EncodedImage, plan: TrimPlan, text: Tensor | None = None) -> Choice:
    """Choose the features of one image that the decoder gets; an image that was asked before remembers.

    Args:
        image: of which the policy's `needs` were observed.
        plan: of a policy that is asked before the decoder.
        text: see `BeforeDecoder.choose_for`; needed where the plan `reads_text`.
    Returns:
        A choice; what is neither kept nor in a group is dropped.
    """
    policy, allowance, merge_ratio = plan.policy, plan.allowance, plan.merge_ratio
    assert isinstance(policy, BeforeDecoder)
    if policy.reads_text:
        assert text is not None
        return policy.choose_for(image, allowance, text)

    def choose() -> Choice:
        """Called unless the image remembers the answer."""
        choice = policy.choose(image, allowance)
        if choice.groups is not None or not merge_ratio:
            return choice
        features, counts = image.features[:, None], (image.num_features,)
        groups = group_dropped(features, choice.kept, counts, image.features_per_tile, merge_ratio)
        return replace(choice, groups=groups)

    # What takes no budget merges by a rule of its own.
    return image.remembered((policy, allowance, merge_ratio) if policy.budgets else policy, choose)


def max_rows(num_features: int, num_heads: int, features_per_tile: int, plan: TrimPlan) -> int:
    """Most rows that an image can hold after selection; at most `num_features`.

    Args:
        num_features: valid features of the image, at least 1.
        num_heads: H.
        features_per_tile: of the model.
        plan: of the request.
    """
    if plan.policy is None:
        return num_features
    match plan.allowance.budget if plan.policy.budgets else None:
        case HeadRatio(ratio) if plan.place is not Place.IN_GUIDE:  # a guide may have more heads
            kept = num_heads * budget(ratio, num_features)
        case FixedRatio(ratio):
            kept = budget(ratio, num_features)
        case FixedCount(count):
            kept = count
        case _:
            kept = num_features
    kept = min(kept, cap(plan.allowance.max_fraction, num_features))
    if plan.merge_ratio:
        kept += num_features // features_per_tile * budget(plan.merge_ratio, features_per_tile)
    return min(kept, num_features)


def scratch_bytes(num_tiles: int, features_per_tile: int, hidden_size: int) -> int:
    """Most temporary bytes for choosing from one image and merging what is not kept.

    A policy that compares features holds their likeness within each tile, [tiles, F, F]; merging holds what it
    averages, at most twice, and a trained policy what it makes of all features, at most three times. All are float32.

    Args:
        num_tiles: of the image.
        features_per_tile: F.
        hidden_size: of a feature.
    """
    likeness = num_tiles * features_per_tile**2
    directions = 3 * num_tiles * features_per_tile * hidden_size
    return 4 * (likeness + directions)


def bitmap(indices: Tensor, num_features: int) -> bytes:
    """Pack indices in [0, num_features) into bits, least significant first.

    >>> bitmap(Tensor([0, 9]).long(), 10).hex()
    '0102'
    """
    bits = np.zeros(num_features, dtype=bool)
    bits[indices.cpu().numpy()] = True
    return np.packbits(bits, bitorder="little").tobytes()
