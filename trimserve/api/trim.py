"""How a request wants its visual features trimmed; what that comes to is resolved in `trimming/plan.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Budget", "FixedCount", "FixedRatio", "Knee", "TopP", "TrimRequest"]


@dataclass(frozen=True, slots=True)
class FixedRatio:
    """The same share of every image."""

    ratio: float
    """In (0, 1]."""


@dataclass(frozen=True, slots=True)
class FixedCount:
    """The same number of every image."""

    count: int
    """At least 1; an image that has fewer keeps them all."""


@dataclass(frozen=True, slots=True)
class TopP:
    """The smallest set that covers a share of the scores' sum."""

    share: float
    """In (0, 1]; 1 keeps everything."""


@dataclass(frozen=True, slots=True)
class Knee:
    """What lies before the bend of the sorted scores."""


Budget = FixedRatio | FixedCount | TopP | Knee
"""How many features of an image may stay."""


@dataclass(frozen=True, slots=True)
class TrimRequest:
    """How one request wants its visual features trimmed."""

    enabled: bool = True
    policy: str = "trimmed"
    """One of `ModelInfo.policies`."""
    k_ratio: float = 1.0
    """Budget per head in (0, 1]: each head picks ceil(k_ratio * N) of an image's N valid features. Where `budget` is
    None, every other policy that chooses after the first cross-attention layer keeps as many features as those picks
    come to."""
    max_kept_fraction: float | None = None
    """Cap of what is kept, in (0, 1], per image; None: no cap."""
    merge_ratio: float = 0.0
    """Rows in [0, 1] that the features of a tile that are not kept are merged into, as a share of its features
    (`trimming/merging.py`); 0: they are dropped."""
    return_selection: bool = False
    """Whether the answer tells which features were kept."""
    budget: Budget | None = None
    """How many features of each image stay; None: half of them where the policy chooses before the decoder,
    otherwise see `k_ratio`."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of the policy; those that are not there have its defaults."""
