"""Which visual features later layers keep: what a request asks for, and what the policy that it names answers.

Policies see one image at a time (`policies/policy.py`); here their answers are put together. This file knows no model.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trimserve.models.encoded_image import Choice, EncodedImage, Observation
from trimserve.models.merging import Groups, group_dropped
from trimserve.models.policies.budget import Allowance, Budget, FixedCount, FixedRatio, HeadRatio, TopP, budget, cap
from trimserve.models.policies.guided import Guided
from trimserve.models.policies.policy import AfterFirstLayer, BeforeDecoder, ExitRule, FirstLayer, Policy
from trimserve.models.policies.table import POLICIES
from trimserve.models.policies.trimmed import Trimmed

__all__ = [
    "DEFAULT_RATIO",
    "ImageSelection",
    "Selection",
    "TrimParams",
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
class TrimParams:
    """How one request wants its visual features trimmed."""

    enabled: bool = True
    policy: str = "trimmed"
    """One of `POLICIES`."""
    k_ratio: float = 1.0
    """Budget per head in (0, 1]: each head picks ceil(k_ratio * N) of an image's N valid features. Where `budget` is
    None, every other policy that chooses after the first cross-attention layer keeps as many features as those picks
    come to."""
    max_kept_fraction: float | None = None
    """Cap of what is kept, in (0, 1], per image; None: no cap."""
    merge_ratio: float = 0.0
    """Rows in [0, 1] that the features of a tile that are not kept are merged into, as a share of its features
    (`merging.py`); 0: they are dropped."""
    return_selection: bool = False
    budget: Budget | None = None
    """How many features of each image stay; None: `DEFAULT_RATIO` of them where the policy chooses before the decoder,
    otherwise see `k_ratio`."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of the policy; those that are not there have its defaults."""

    @property
    def can_drop(self) -> bool:
        """Whether any feature could go; if not, the request takes the untrimmed path, bit for bit."""
        if not self.enabled:
            return False
        policy = self.make_policy()
        if (self.max_kept_fraction or 1) < 1 or not policy.budgets or policy.is_cascade or policy.exit_rule is not None:
            return True
        match self.allowance.budget:
            case HeadRatio(ratio) | FixedRatio(ratio) | TopP(ratio):
                return ratio < 1
            case _:
                return True

    @property
    def is_before_decoder(self) -> bool:
        """Whether features are chosen from the images alone."""
        return self.can_drop and issubclass(POLICIES[self.policy], BeforeDecoder)

    @property
    def is_after_first_layer(self) -> bool:
        """Whether features are chosen in the first cross-attention layer."""
        return self.can_drop and issubclass(POLICIES[self.policy], AfterFirstLayer) and not self.is_guided

    @property
    def is_guided(self) -> bool:
        """Whether features are chosen in the first cross-attention layer of a guide, before the decoder."""
        return self.can_drop and issubclass(POLICIES[self.policy], Guided)

    @property
    def is_cascade(self) -> bool:
        """Whether later cross-attention layers choose again, among what is kept."""
        return self.enabled and self.make_policy().is_cascade

    @property
    def exit_rule(self) -> ExitRule | None:
        """When later cross-attention layers are left out; None: never."""
        return self.make_policy().exit_rule if self.enabled else None

    @property
    def allowance(self) -> Allowance:
        """How many features of an image may stay, or how many each head may pick."""
        is_before = issubclass(POLICIES[self.policy], BeforeDecoder)
        asked = self.budget or (FixedRatio(DEFAULT_RATIO) if is_before else HeadRatio(self.k_ratio))
        return Allowance(asked, self.max_kept_fraction)

    @property
    def needs(self) -> frozenset[Observation]:
        """What the policy wants to know of the vision layers."""
        return POLICIES[self.policy].needs if self.can_drop else frozenset()

    @property
    def choice_key(self) -> Hashable:
        """All that a choice before the decoder depends on beside the image."""
        return self.make_policy(), self.allowance, self.merge_ratio

    def make_policy(self) -> Policy:
        """The policy with its parameters."""
        return POLICIES[self.policy](**self.parameters)


@dataclass(frozen=True, slots=True)
class ImageSelection:
    """What was kept of one image, for people and tools that want to see it.

    Feature n of an image: tile n // features_per_tile (row-major on the tile grid), and within the tile 0 is the
    class token and 1 + row * patches_per_side + column a patch. A bitmap has bit n % 8 (least significant first)
    of byte n // 8 set where feature n is in.
    """

    tiles_high: int
    tiles_wide: int
    features_per_tile: int
    content_height: int
    """Pixels of the tile canvas that the resized image covers, from the top; the rest is padding."""
    content_width: int
    """The same from the left."""
    kept: bytes
    """Bitmap of the kept features."""
    picks_by_head: tuple[bytes, ...]
    """Bitmap of each query head's picks in the first cross-attention layer; empty when trimming is off and for the
    policies that ask no head."""


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


def max_rows(num_features: int, num_heads: int, features_per_tile: int, trim: TrimParams) -> int:
    """Most rows that an image can hold after selection; at most `num_features`.

    Args:
        num_features: valid features of the image, at least 1.
        num_heads: H.
        features_per_tile: of the model.
        trim: of the request.
    """
    if not trim.can_drop:
        return num_features
    match trim.allowance.budget if POLICIES[trim.policy].budgets else None:
        case HeadRatio(ratio) if not trim.is_guided:  # by a guide's heads, of which it may have more
            kept = num_heads * budget(ratio, num_features)
        case FixedRatio(ratio):
            kept = budget(ratio, num_features)
        case FixedCount(count):
            kept = count
        case _:
            kept = num_features
    kept = min(kept, cap(trim.max_kept_fraction, num_features))
    if trim.merge_ratio:
        kept += num_features // features_per_tile * budget(trim.merge_ratio, features_per_tile)
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


def select(layer: FirstLayer, trim: TrimParams) -> Selection:
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
    if selection.groups is not None or not trim.merge_ratio:
        return selection
    size = layer.features_per_tile
    groups = group_dropped(layer.keys, selection.kept, layer.num_features, size, trim.merge_ratio)
    return replace(selection, groups=groups)


def select_again(layer: FirstLayer, trim: TrimParams) -> Selection:
    """Choose among the features that are kept of each image, in a later cross-attention layer.

    Args:
        layer: what it knows of the images, at least one, and of each the features that are kept until here.
        trim: names a cascade.
    """
    policy = trim.make_policy()
    assert isinstance(policy, AfterFirstLayer)
    return Selection.of([Choice(policy.choose_again(image)) for image in layer.images()], layer.num_features)


def choose_from_image(image: EncodedImage, trim: TrimParams) -> Choice:
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
        if choice.groups is not None or not trim.merge_ratio:
            return choice
        features, counts = image.features[:, None], (image.num_features,)
        groups = group_dropped(features, choice.kept, counts, image.features_per_tile, trim.merge_ratio)
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
