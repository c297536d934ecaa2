"""What an executor is told to do in one step, and what it answers: plain data that can cross a process.

A plan names sequences by number and never refers to an object. The engine owns their order, their pages and all that
is needed to compute them again; the executor owns weights, the memory of pages, image features and what a running
prefill holds.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from trimserve.api.chunks import ImageSelection, TokenLogprob
from trimserve.api.constraint import Constraint
from trimserve.api.sampling import SamplingParams
from trimserve.model.key_values import Tables
from trimserve.model.prefilled import TrimTimes
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.selection import KeptSets

__all__ = [
    "Drawn",
    "Failed",
    "ImageCacheCounts",
    "NewSequence",
    "PageGrant",
    "PrefillReport",
    "PrefillSlice",
    "PrefillTimes",
    "Rows",
    "StepPlan",
    "StepResult",
]


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the executor does not know yet, or has been told to forget."""

    sequence: int
    request_id: str
    """For the log."""
    prompt: PreparedPrompt
    trim: TrimPlan
    sampling: SamplingParams
    end_token_ids: frozenset[int]
    """Tokens that end the sequence, impossible before `sampling.min_new_tokens`."""
    adapter: str | None = None
    """Name of a loaded adapter; None for the base model."""
    stored: KeptSets | None = None
    """What trimming decided when the sequence was computed before; None asks the policy."""
    generated_token_ids: tuple[int, ...] = ()
    """Tokens it had drawn before it was dropped: they are read again, not drawn again."""
    choices: tuple[SamplingParams, ...] = ()
    """Of further answers to the prompt: their first tokens are drawn with its own, from the same logits."""
    shares: int | None = None
    """A known sequence with the same prompt in its pages: those that the prompt fills, and those of the features, are
    granted to both, and the prompt is not read. None if it is."""
    constraint: Constraint | None = None
    """What form the answer must have; compiled, or looked up, where tokens are drawn (ADR-0015)."""
    wants_forced: bool = False
    """Whether `Drawn.forced` is filled in."""


@dataclass(frozen=True, slots=True)
class PageGrant:
    """The pages that a sequence owns from now on; they replace those it was granted before."""

    sequence: int
    self_pages: Tables
    """Room for the text."""
    cross_pages: Tables
    """Room for the visual features: before the prefill as many as trimming can leave at most."""


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """Go on with prompts, at least one layer and then until the time is over, or a pass is."""

    sequences: tuple[int, ...]
    """Whose prompts are not read yet, the first before the others; those that are ready for it share its pass."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Rows:
    """New text rows of a sequence, after the last of which a token is drawn, and rows of what that may be."""

    sequence: int
    position: int
    """Of the first row."""
    token_ids: tuple[int, ...] | None = None
    """At least one; None is the token that was drawn last, so that a step can be planned before it is known."""
    drafts: tuple[int, ...] = ()
    """Tokens that may be drawn next, in order, each a row of its own in the pages. One is drawn after each row, as it
    would be without drafts, for as long as drafts are what is drawn (ADR-0018)."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Taken in this order: what ends, what is new, pages, the slice of a prefill, rows, rows ahead."""

    ended: tuple[int, ...] = ()
    """Sequences to forget; their pages may belong to others at once."""
    new: tuple[NewSequence, ...] = ()
    pages: tuple[PageGrant, ...] = ()
    prefill: PrefillSlice | None = None
    rows: tuple[Rows, ...] = ()
    ahead: tuple[Rows, ...] = ()
    """Of the step after this one: of sequences in `rows` those behind the tokens that are yet to be drawn. An executor
    that runs ahead begins them before it reads these tokens."""


class PrefillTimes(NamedTuple):
    """When the stages of a prefill ended: `time.monotonic()` of this host."""

    began_at: float
    encoded_at: float
    """The images were encoded."""
    prefilled_at: float
    """Keys and values of the prompt were in its pages."""


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """A prompt is in its pages: what became of its visual features, and when."""

    sequence: int
    num_padding: tuple[int, ...]
    """Features of padding tiles, per image."""
    num_valid: tuple[int, ...]
    """Features of real tiles, per image."""
    num_kept: tuple[int, ...]
    """Features kept in the first cross-attention layer, per image, without merged rows."""
    num_merged: tuple[int, ...]
    """Merged rows beside them, per image; empty if nothing is merged."""
    layer_rows: tuple[tuple[int, ...], ...]
    """Rows of each image that each cross-attention layer holds; empty if all of them hold kept and merged ones."""
    held_rows: tuple[int, ...]
    """Rows that lie in the pages of each cross-attention layer: those that decoded tokens see."""
    selections: tuple[ImageSelection, ...]
    """One per image when the request asked for it."""
    stored: KeptSets | None
    """What trimming decided; given back in `NewSequence.stored`, the prompt is computed again alike."""
    times: PrefillTimes
    trim_times: tuple[TrimTimes, ...]
    """Of every cross-attention layer that trimmed."""
    seconds: float = 0.0
    """Spent on this prompt, of a pass with others its share; other work between its slices is left out."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sequence's next token; those of one step are in order."""

    sequence: int
    token_id: int
    logprob: TokenLogprob | None = None
    """None unless the request asked for it."""
    choice: int = 0
    """0 is the sequence itself; n is the first token of the n-th of its `NewSequence.choices`."""
    is_complete: bool = False
    """Whether the answer satisfies its constraint with this token, and can have no other after it."""
    forced: tuple[int, ...] = ()
    """Tokens that write the only text with which the constraint lets the answer go on. Other tokens may write it too,
    so these are drafts. Of the last token that a step drew, if `NewSequence.wants_forced`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that cannot go on; the others are unharmed."""

    sequence: int
    message: str
    is_out_of_memory: bool = False
    field: str | None = None
    """Of the request, if that field is to blame."""


@dataclass(frozen=True, slots=True)
class ImageCacheCounts:
    """The image cache, for the server's status."""

    num_bytes: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_kv_bytes: int = 0
    """Of `num_bytes`, set aside for keys and values."""
    num_kv_hits: int = 0
    """Images whose keys and values were there."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step came to; never logits."""

    prefilled: tuple[PrefillReport, ...] = ()
    """Prompts of the plan's slice that were finished."""
    drawn: tuple[Drawn, ...] = ()
    failed: tuple[Failed, ...] = ()
    rows_seconds: float = 0.0
    """Of the plan's rows, sampling included."""
    begun: tuple[int, ...] = ()
    """Sequences of `StepPlan.ahead` whose rows were begun: the next rows that are asked for are theirs, of those that
    have not ended."""
    image_cache: ImageCacheCounts = field(default=ImageCacheCounts())
