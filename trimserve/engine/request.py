"""A request on its way in and the chunks on its way out: the vocabulary between server, engine and model.

Plain frozen data. Bounds are checked where requests enter, `server/convert.py` and `models/prompt.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

from trimserve.models.prompt import Prompt
from trimserve.models.trimming import ImageSelection, TrimParams

__all__ = [
    "CrossKvBytes",
    "FinishReason",
    "Finished",
    "GenerationChunk",
    "GenerationRequest",
    "ImageUsage",
    "SamplingParams",
    "StageSpan",
    "Started",
    "Timings",
    "TokenDelta",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; every default of the checkpoint is already filled in."""

    max_new_tokens: int | None = None
    """None: `GenerationDefaults.max_new_tokens` or the room left in the context, whichever is smaller."""
    min_new_tokens: int = 0
    """End tokens and stop strings have no effect before this many tokens."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """0 is greedy: the largest logit, ties to the lower id."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens."""
    presence_penalty: float = 0.0
    """Over generated tokens."""
    frequency_penalty: float = 0.0
    """Over generated tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Unsigned 64 bits; the server draws one when the client sent none."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_top_logprobs: int | None = None
    """None: no logprobs at all; 0: of the drawn token only."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, validated as far as that is possible without the tokenizer and the images' pixels."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    trim: TrimParams
    priority: int = 0
    """Larger is served earlier; first come first served among equals."""


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """Visual features of one image."""

    padding_features: int
    """Features of padding tiles: never projected, cached or attended to (lossless)."""
    valid_features: int
    """Features of real tiles: what an untrimmed request holds."""
    kept_features: int
    """Features chosen to stay as they are; equal to `valid_features` when trimming is off."""
    merged_features: int = 0
    """Rows that the other features were merged into; 0 when they were dropped."""
    layer_rows: tuple[int, ...] = ()
    """Rows that stand for the image in each cross-attention layer; empty when that is `held_rows` in all of them."""

    @property
    def held_rows(self) -> int:
        """Rows that stand for the image after the first selection; over `valid_features`, the kept fraction."""
        return self.kept_features + self.merged_features


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one generated position: the model's own, before penalties and filters."""

    logprob: float
    """Of the drawn token, natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the most likely tokens, best first."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """From when until when a stage of one request lasted, as `time.monotonic()`; it may lie within another."""

    stage: str
    """queue, image_decode, vision_encode, prefill, trim_select or trim_gather."""
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Started:
    """First chunk: prefill is done, the kept set is known."""

    request_id: str
    num_prompt_tokens: int
    images: tuple[ImageUsage, ...]
    seed: int
    """The seed in use, also when the server drew it: send it again to get the same tokens."""
    selections: tuple[ImageSelection, ...] = ()
    """One per image when the request asked for `return_selection`."""
    spans: tuple[StageSpan, ...] = field(default=(), compare=False)
    """Of every stage until now; the last is prefill."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New text and the tokens it came from.

    `text` may be empty while a code point or a stop string is incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when the request asked for logprobs."""

    @classmethod
    def joined(cls, deltas: Sequence["TokenDelta"]) -> "TokenDelta":
        """Several that follow each other as one."""
        return cls(
            "".join(delta.text for delta in deltas),
            tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        )


class FinishReason(Enum):
    """Why generation ended. Cancellation and deadlines end a request by an exception instead."""

    STOP = "stop"
    """An end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_new_tokens` came first."""


@dataclass(frozen=True, slots=True)
class CrossKvBytes:
    """Cross-attention KV of one request over all cross-attention layers, in bytes of whole pages.

    padded = held + saved_by_padding + saved_by_trimming + saved_by_visibility, exactly.
    """

    untrimmed: int
    """What the valid features of every image would take."""
    held: int
    """What the request holds while it decodes."""
    saved_by_padding: int
    """Lossless: padding tiles, which transformers projects and caches."""
    saved_by_trimming: int
    """Lossy: features that were dropped or merged."""
    saved_by_visibility: int
    """Lossless: images that the last prompt row, and so every generated token, does not see."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each stage of one request took."""

    queue_seconds: float
    preprocess_seconds: float
    """Tokenising, and `image_decode_seconds`."""
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    image_decode_seconds: float = 0.0
    """Decoding and resizing; a part of `preprocess_seconds`."""
    trim_select_seconds: float = 0.0
    """Scoring features and choosing among them; a part of `prefill_seconds`."""
    trim_gather_seconds: float = 0.0
    """Gathering and merging what was chosen; a part of `prefill_seconds`."""
    detokenize_seconds: float = 0.0
    """From tokens to text; a part of `decode_seconds`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last chunk."""

    reason: FinishReason
    matched_stop: str | int | None
    """The stop string or the token id that ended generation; None when the reason is LENGTH."""
    num_prompt_tokens: int
    num_generated_tokens: int
    cross_kv: CrossKvBytes
    timings: Timings


GenerationChunk = Started | TokenDelta | Finished
