"""What prefill of one request came to: the answer of `Mllama.prefill`, read by the engine."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from trimserve.api.chunks import ImageSelection

__all__ = ["Prefilled", "TrimTimes"]


class TrimTimes(NamedTuple):
    """When trimming was done: values of `time.monotonic()`, on the host."""

    began_at: float
    selected_at: float
    """What stays was known."""
    gathered_at: float
    """It lay side by side; merging is part of this."""


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
    """Rows left after trimming, per image: kept features and merged rows, in the first cross-attention layer."""
    num_merged: tuple[int, ...] = ()
    """Merged rows among `num_kept`, per image; empty when nothing is merged."""
    selections: tuple[ImageSelection, ...] = ()
    """One per image when the request asked for it."""
    trim_times: TrimTimes | None = None
    """None when nothing was trimmed."""
    later_trim_times: tuple[TrimTimes, ...] = ()
    """Of later cross-attention layers that trimmed again."""
    layer_rows: tuple[tuple[int, ...], ...] = ()
    """Rows of each image that each cross-attention layer holds; empty when every layer holds `num_kept`."""
