"""The answer to a request, chunk by chunk; a unary answer is a fold over the chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

from trimserve.api.prompt import Region

__all__ = [
    "CrossKvBytes",
    "FinishReason",
    "Finished",
    "GenerationChunk",
    "ImageSelection",
    "ImageUsage",
    "StageSpan",
    "Started",
    "Timings",
    "TokenDelta",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True)
class ImageSelection:
    """What was kept of one image, for inspection.

    Feature n of an image: tile n // features_per_tile (row-major on the tile grid), and within the tile 0 is the
    class token and 1 + row * patches_per_side + column a patch. A bitmap has bit n % 8 (least significant first)
    of byte n // 8 set where feature n is in.
    """

    tiles_high: int
    tiles_wide: int
    features_per_tile: int
    content_height: int
    """Rows of the tile canvas, from the top, that the resized image covers; the rest is padding."""
    content_width: int
    """Columns, from the left."""
    kept: bytes
    """Bitmap of the kept features."""
    picks_by_head: tuple[bytes, ...]
    """Bitmap of each query head's picks in the first cross-attention layer; empty if trimming is off or the policy does
    not use heads."""


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """Visual features of one image."""

    padding_features: int
    """Features of padding tiles: never projected, cached or attended to (lossless)."""
    valid_features: int
    """Features of real tiles; an untrimmed request holds all of them."""
    kept_features: int
    """Features kept unchanged; equal to `valid_features` if trimming is off."""
    merged_features: int = 0
    """Rows that the other features were merged into; 0 if they were dropped."""
    layer_rows: tuple[int, ...] = ()
    """Rows held for the image in each cross-attention layer; empty if it is `held_rows` in all of them."""

    @property
    def held_rows(self) -> int:
        """Rows held for the image after the first selection; divided by `valid_features`, the kept fraction."""
        return self.kept_features + self.merged_features


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one generated position: the model's own, before penalties and filters."""

    logprob: float
    """Natural logarithm of the drawn token's probability."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the most likely tokens, best first."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """Begin and end of a stage of one request, as `time.monotonic()` values; stages may nest."""

    stage: str
    """queue, image_decode, vision_encode, prefill, trim_select or trim_gather."""
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Started:
    """First chunk: prefill is done and the kept set is known."""

    request_id: str
    num_prompt_tokens: int
    images: tuple[ImageUsage, ...]
    seed: int
    """The seed in use, even if the server drew it: sending it again gives the same tokens, but for rounding."""
    selections: tuple[ImageSelection, ...] = ()
    """One per image if the request asked for `return_selection`."""
    spans: tuple[StageSpan, ...] = field(default=(), compare=False)
    """All stages so far; the last is prefill."""
    looked_at: Region | None = None
    """The region of the first image that is the second one, if the request asked for `look_again`."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New text and its tokens.

    `text` may be empty while a code point or a stop string is incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token if the request asked for logprobs."""
    choice: int = 0
    """Which of the request's answers goes on."""

    @classmethod
    def joined(cls, deltas: Sequence["TokenDelta"]) -> "TokenDelta":
        """Join consecutive deltas of one answer, at least one."""
        return cls(
            "".join(delta.text for delta in deltas),
            tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            deltas[0].choice,
        )


class FinishReason(Enum):
    """Why generation ended. Cancellation and deadlines end a request by an exception instead."""

    STOP = "stop"
    """An end token, a stop token or a stop string, or a constraint that allows nothing more."""
    LENGTH = "length"
    """`max_new_tokens` was reached."""


@dataclass(frozen=True, slots=True)
class CrossKvBytes:
    """Cross-attention KV of one request over all cross-attention layers, in bytes of whole pages.

    padded = held + saved_by_padding + saved_by_trimming + saved_by_visibility, exactly.
    """

    untrimmed: int
    """Size with the valid features of every image."""
    held: int
    """Held while the request decodes."""
    saved_by_padding: int
    """Lossless: padding tiles, which transformers projects and caches."""
    saved_by_trimming: int
    """Lossy: features that were dropped or merged."""
    saved_by_visibility: int
    """Lossless: images that the last prompt row, and so every generated token, does not see."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage of one request."""

    queue_seconds: float
    preprocess_seconds: float
    """Tokenising, plus `image_decode_seconds`."""
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    image_decode_seconds: float = 0.0
    """Decoding and resizing images; part of `preprocess_seconds`."""
    trim_select_seconds: float = 0.0
    """Scoring and selecting features; part of `prefill_seconds`."""
    trim_gather_seconds: float = 0.0
    """Gathering and merging features; part of `prefill_seconds`."""
    detokenize_seconds: float = 0.0
    """From tokens to text; part of `decode_seconds`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last chunk of an answer; the last chunk of all when every answer has had one."""

    reason: FinishReason
    matched_stop: str | int | None
    """The stop string or token id that ended generation; None if the reason is LENGTH, or the constraint was met."""
    num_prompt_tokens: int
    num_generated_tokens: int
    cross_kv: CrossKvBytes
    timings: Timings
    choice: int = 0
    """Which of the request's answers has ended."""


GenerationChunk = Started | TokenDelta | Finished
