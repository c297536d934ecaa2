"""What prefill of one request came to: the result of `Mllama.prefill`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from trimserve.api.chunks import ImageSelection
from trimserve.trimming.selection import KeptSets

__all__ = ["Prefilled", "TrimTimes"]


class TrimTimes(NamedTuple):
    """When trimming was done: values of `time.monotonic()`, on the host."""

    began_at: float
    selected_at: float
    """The kept set was known."""
    gathered_at: float
    """Kept rows lay side by side, merged ones included."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Logits after the prompt and the account of its visual features."""

    logits: Tensor
    """float32 [vocab_size], of the token after the prompt."""
    num_padding: tuple[int, ...]
    """Features of padding tiles, per image."""
    num_valid: tuple[int, ...]
    """Features of real tiles, per image."""
    num_kept: tuple[int, ...]
    """Features kept in the first cross-attention layer, per image, without merged rows."""
    num_merged: tuple[int, ...] = ()
    """Merged rows beside them, per image; empty if nothing is merged."""
    selections: tuple[ImageSelection, ...] = ()
    """One per image if the request asked for it."""
    trim_times: TrimTimes | None = None
    """None if nothing was trimmed."""
    later_trim_times: tuple[TrimTimes, ...] = ()
    """Of later cross-attention layers that trimmed again."""
    layer_rows: tuple[tuple[int, ...], ...] = ()
    """Rows held per image by each cross-attention layer; empty if every layer holds `num_held`."""
    kept_sets: KeptSets = field(default_factory=KeptSets)
    """What trimming selected, for a prefill that computes the sequence again."""

    @property
    def num_held(self) -> tuple[int, ...]:
        """Rows held in the first cross-attention layer, per image: kept features and merged rows."""
        num_merged = self.num_merged or (0,) * len(self.num_kept)
        return tuple(kept + merged for kept, merged in zip(self.num_kept, num_merged, strict=True))
