"""One prompt in a prefill: what is to be read, and what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from trimserve.api.chunks import ImageSelection
from trimserve.model.key_values import KeyValues
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.selection import KeptSets

__all__ = ["Prefilled", "ToPrefill", "TrimTimes"]


@dataclass(frozen=True, slots=True)
class ToPrefill:
    """A prompt that is to be read."""

    prompt: PreparedPrompt
    """Token ids [T] and images."""
    images: Sequence[EncodedImage]
    """Of the prompt, see `Mllama.encode_image`; with what `trim` needs."""
    trim: TrimPlan
    """How to trim; has no effect without images."""
    kv: KeyValues
    """To fill: with room for T positions, and for the most rows that trimming can leave; names the adapter."""
    stored: KeptSets | None = None
    """What an earlier prefill of the same prompt kept; neither policy nor guide is asked then, and everything that is
    computed is the same, bit for bit."""


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
