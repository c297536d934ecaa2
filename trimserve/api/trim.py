"""How a request wants its visual features trimmed; `trimming/plan.py` resolves it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Budget", "FixedCount", "FixedRatio", "Knee", "LookAgain", "TopP", "TrimRequest"]


@dataclass(frozen=True, slots=True)
class FixedRatio:
    """Keep the same share of every image."""

    ratio: float
    """In (0, 1]."""


@dataclass(frozen=True, slots=True)
class FixedCount:
    """Keep the same number of features of every image."""

    count: int
    """At least 1; an image with fewer features keeps them all."""


@dataclass(frozen=True, slots=True)
class TopP:
    """Keep the smallest set that covers a share of the scores' sum."""

    share: float
    """In (0, 1]; 1 keeps everything."""


@dataclass(frozen=True, slots=True)
class Knee:
    """Keep what lies before the knee of the sorted scores."""


Budget = FixedRatio | FixedCount | TopP | Knee
"""How many features of an image may stay."""


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Show the model the most-voted region of its image as a second image, from the original pixels."""

    side_ratio: float = 0.5
    """Height and width of the region, as shares in (0, 1] of the image's."""


@dataclass(frozen=True, slots=True)
class TrimRequest:
    """How one request wants its visual features trimmed."""

    enabled: bool = True
    policy: str = "trimmed"
    """One of `ModelInfo.policies`."""
    k_ratio: float = 1.0
    """Budget per head in (0, 1]: each head picks ceil(k_ratio * N) of an image's N valid features. If `budget` is None,
    other policies that choose after the first cross-attention layer keep as many features as the union of those
    picks."""
    max_kept_fraction: float | None = None
    """Most of an image that is kept, in (0, 1]; None for no cap."""
    merge_ratio: float = 0.0
    """Features of a tile that are not kept are merged into this many rows, as a share in [0, 1] of the tile's features
    (`trimming/merging.py`); 0 drops them."""
    return_selection: bool = False
    """Whether the answer says which features were kept."""
    budget: Budget | None = None
    """How many features of each image stay; None is half of them for policies that choose before the decoder, and
    `k_ratio` for the others."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the policy; missing ones have its defaults."""
    look_again: LookAgain | None = None
    """Whether the region that most heads picked is looked at again; None is not."""
