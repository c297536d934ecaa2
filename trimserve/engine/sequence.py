"""One request inside the engine: its prompt, what it has generated, what it holds, when each stage ended.

It keeps all that is needed to compute it again. Made where the request enters, changed by the engine thread only. It
knows no other request.
"""

import time
from collections.abc import Callable, Iterable
from copy import copy
from enum import Enum

from tokenizers import Tokenizer

from trimserve.api.chunks import (
    CrossKvBytes,
    Finished,
    FinishReason,
    GenerationChunk,
    StageSpan,
    Started,
    TokenDelta,
)
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.engine.account import account_cross_kv, image_usage
from trimserve.engine.answer import Answer
from trimserve.engine.kv_pool import KVPool, SequencePages
from trimserve.engine.stages import Stages
from trimserve.errors import TrimserveError
from trimserve.executor.plan import Drawn, NewSequence, PrefillReport
from trimserve.model.prepared import PreparedPrompt
from trimserve.model.visibility import visible_images
from trimserve.ops import PAGE_POSITIONS
from trimserve.trimming.plan import TrimPlan, max_rows
from trimserve.trimming.selection import KeptSets

__all__ = ["Sequence", "SequenceState", "Sink"]

Sink = Callable[[GenerationChunk | TrimserveError], None]
"""Takes what a request produces; `Finished` or an error is the last. Must not raise."""


class SequenceState(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    """It has a place in the batch."""
    ENDED = "ended"


class Sequence:
    """A tokenised request and everything that generation adds to it."""

    def __init__(
        self,
        request: GenerationRequest,
        token_ids: tuple[int, ...],
        info: ModelInfo,
        tokenizer: Tokenizer,
        sink: Sink,
        submitted_at: float,
        deadline: float | None = None,
        images_taken: Callable[[], None] | None = None,
    ) -> None:
        """Check that prompt and answer fit into the context.

        Args:
            request: what was asked.
            token_ids: its prompt.
            info: of the model.
            tokenizer: of the model.
            sink: takes the chunks, on the engine thread.
            submitted_at: `time.monotonic()` when the request came.
            deadline: `time.monotonic()` after which nobody wants the answer; None: never.
            images_taken: called when work on the images begins.
        Raises:
            InvalidRequest: the prompt leaves no room for `max_new_tokens`, or for one token; or fewer than
                `min_new_tokens` can come.
        """
        self.request_id = request.request_id
        self.priority = request.priority
        self.adapter = request.adapter
        self.constraint = request.constraint
        self.num_choices = request.num_choices
        """Answers that the request asked for."""
        self.choice = 0
        """Which of them this is."""
        self.trim = TrimPlan.of(request.trim)
        self.sink = sink
        self.deadline = deadline
        self.state = SequenceState.WAITING
        self.has_started = False
        """Whether its prompt was read once, and its first chunk said."""
        self.was_preempted = False
        """Whether it had pages, and lost them."""
        self.num_features = 0
        """Valid ones, of its images; known with them."""
        self.max_cross_rows = 0
        """Most rows of cross-attention KV that decoding can see; known with the images, exactly after the prefill."""
        self.cross_kv = CrossKvBytes(0, 0, 0, 0, 0)
        """Zero before prefill."""
        self._info = info
        self._images_taken = images_taken
        self._token_ids = token_ids
        self._prompt: PreparedPrompt | None = None
        self._stored: KeptSets | None = None
        self._number, self._num_shared = -1, 0
        self._pages: SequencePages | None = None
        self._family: tuple[Sequence, ...] = ()
        self._stages = Stages(submitted_at)
        self._answer = Answer.to(request.sampling, len(token_ids), info, tokenizer)

    @property
    def submitted_at(self) -> float:
        """`time.monotonic()` when the request came."""
        return self._stages.submitted_at

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn."""
        return self._answer.params

    @property
    def max_new_tokens(self) -> int:
        """Tokens at which it ends at the latest."""
        return self._answer.max_new_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """Tokens drawn until now; only grows."""
        return self._answer.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while more tokens are wanted."""
        return self._answer.finish_reason

    @property
    def number(self) -> int:
        """What plans call it; another one each time it is admitted."""
        assert self.holds_pages, "a sequence has a number only while it runs"
        return self._number

    @property
    def pages(self) -> SequencePages:
        """What it holds, from admission to the end."""
        assert self._pages is not None, "a sequence holds pages only while it runs"
        return self._pages

    @property
    def holds_pages(self) -> bool:
        """Whether it has been admitted, and not let go since."""
        return self._pages is not None

    @property
    def family(self) -> "tuple[Sequence, ...]":
        """All answers by number, once the prompt was read; until then the first."""
        return self._family or (self,)

    @property
    def num_joining(self) -> int:
        """Answers that begin when it joins."""
        return 1 if self.has_started else self.num_choices

    @property
    def source(self) -> "Sequence | None":
        """Another answer that runs, in whose pages the prompt lies; for a sequence that waits."""
        return next((each for each in self.family if each.holds_pages), None)

    @property
    def request_state(self) -> SequenceState:
        """Of all answers together."""
        states = {each.state for each in self.family}
        order = SequenceState.RUNNING, SequenceState.WAITING, SequenceState.ENDED
        return next(state for state in order if state in states)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """Of the prompt, the image tokens among them."""
        return self._token_ids

    @property
    def num_positions(self) -> int:
        """Text positions in its pages while it decodes: all tokens but the last one drawn."""
        return self.num_prompt_tokens + self.num_generated_tokens - 1

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._token_ids)

    @property
    def num_prompt_rows(self) -> int:
        """Tokens of the prompt and valid features of its images."""
        return self.num_prompt_tokens + self.num_features

    @property
    def max_positions(self) -> int:
        """Text positions that prompt and answer take at most."""
        return self.num_prompt_tokens + self.max_new_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, and those drawn until now: the positions that it needs for its next token."""
        return self.num_prompt_tokens + self.num_generated_tokens

    @property
    def num_tokens_to_read(self) -> int:
        """Tokens that are computed before it draws the next one, which takes the last drawn token as its row."""
        return self.num_prompt_tokens - self._num_shared + max(0, self.num_generated_tokens - 1)

    @property
    def first_positions(self) -> int:
        """Text positions that it gets pages for when it joins: what it has, and a page to go on."""
        return min(self.num_tokens + PAGE_POSITIONS, self.max_positions)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of decoded images that are kept to compute any of its answers again."""
        prompt = next((each._prompt for each in self.family if each._prompt is not None), None)
        return sum(image.pixel_values.nbytes for image in prompt.images) if prompt is not None else 0

    def pages_to_join(self, pool: KVPool) -> int:
        """Free pages that it takes to join, with all answers that begin then."""
        shared = pool.self_pages(self.num_prompt_tokens // PAGE_POSITIONS * PAGE_POSITIONS)
        pages = self.num_joining * (pool.self_pages(self.first_positions) - shared)
        return pages if self.source else pages + shared + pool.cross_pages(self.max_cross_rows)

    @property
    def least_new_tokens(self) -> int:
        """Tokens that come for certain."""
        params = self.params
        can_stop = not params.ignore_eos or params.stop_strings or params.stop_token_ids
        certain = params.min_new_tokens if can_stop else self.max_new_tokens
        return 1 if self.constraint is not None else max(1, certain)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens drawn until now, an end token among them."""
        return len(self.generated_token_ids)

    def prepared(self, prompt: PreparedPrompt, seconds: float, image_spans: Iterable[StageSpan] = ()) -> None:
        """Take the prompt with its images, and note how long preparing them took.

        Args:
            prompt: what prefill takes.
            seconds: of tokenising and of all images.
            image_spans: one per image, `image_decode`.
        """
        info, counts = self._info, [image.num_tiles * self._info.features_per_tile for image in prompt.images]
        seen = counts[slice(*visible_images(prompt.token_ids, info.image_token_id)[-1])]
        self.num_features = sum(counts)
        self.max_cross_rows = sum(max_rows(count, info.num_heads, info.features_per_tile, self.trim) for count in seen)
        self._prompt = prompt
        self._stages.prepared(seconds, image_spans)

    def admitted(self, number: int, pool: KVPool) -> NewSequence:
        """Take the first pages; it runs from here on.

        Args:
            number: what plans call it.
            pool: has as many free pages as `pages_to_join`.
        Returns:
            What the executor needs to compute it, from the beginning or again.
        """
        assert self._prompt is not None, "a sequence is prepared before it is admitted"
        prompt, source, choices = self._prompt, self.source, range(1, 1 if self.has_started else self.num_choices)
        self._number = number
        if source is None:
            self._num_shared = 0
            self._pages = pool.allocate(self.first_positions, self.max_cross_rows)
        else:
            self._num_shared = self.num_prompt_tokens
            self._pages = source.pages.share(self._num_shared, self.first_positions)
            prompt = PreparedPrompt(prompt.token_ids, ())
        if self._images_taken is not None:
            self._images_taken()
        return NewSequence(
            sequence=number,
            request_id=self.request_id,
            prompt=prompt,
            trim=self.trim,
            sampling=self.params,
            end_token_ids=self._answer.end_token_ids,
            adapter=self.adapter,
            stored=self._stored,
            generated_token_ids=tuple(self.generated_token_ids),
            choices=tuple(self.params.of_choice(choice) for choice in choices),
            shares=None if source is None else source.number,
            constraint=self.constraint,
        )

    def release(self) -> None:
        """Give back the pages; what is needed to compute it again stays."""
        self.pages.release()
        self._pages = None

    def forget(self) -> None:
        """Let go of the prompt: nobody will compute it again."""
        self._prompt = None

    def prefilled(self, report: PrefillReport, pool: KVPool) -> Started | None:
        """Note that the prompt is in its pages, and give back those that it turned out not to need.

        The first time, the request's other answers come to be.

        Returns:
            The first chunk; None if the sequence was computed again.
        """
        self.pages.keep_cross(report.held_rows)
        if self.has_started:
            return None
        self.has_started = True
        self._stored, self.max_cross_rows = report.stored, max(report.held_rows, default=0)
        self._stages.prefilled(report)
        self.cross_kv = account_cross_kv(report, self.pages.cross_bytes, pool)
        if self.num_choices > 1:
            self._branch()
        return Started(
            request_id=self.request_id,
            num_prompt_tokens=self.num_prompt_tokens,
            images=image_usage(report),
            seed=self.params.seed,
            selections=report.selections,
            spans=tuple(self._stages.spans),
        )

    def _branch(self) -> None:
        """Make the other answers, which have drawn nothing yet and know all about the prompt."""
        family = (self, *(copy(self) for _ in range(1, self.num_choices)))
        for choice, each in enumerate(family):
            each.become(choice, family)

    def become(self, choice: int, family: "tuple[Sequence, ...]") -> None:
        """Be one of several answers; all but the first are copies of it, and begin anew."""
        self._family = family
        if not choice:
            return
        self.choice = choice
        self.state = SequenceState.WAITING
        self.was_preempted = False
        self._answer = self._answer.of_choice(choice)
        self._pages = None

    def append(self, drawn: Drawn) -> TokenDelta:
        """Take the next token; `finish_reason` is there when it is the last. See `Answer.append` for its text."""
        logprobs = () if drawn.logprob is None else (drawn.logprob,)
        return TokenDelta(self._answer.append(drawn), (drawn.token_id,), logprobs, self.choice)

    def finished(self) -> Finished:
        """The last chunk; the request ends now."""
        assert self.finish_reason is not None, "only an ended sequence has a last chunk"
        return Finished(
            reason=self.finish_reason,
            matched_stop=self._answer.matched_stop,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            cross_kv=self.cross_kv,
            timings=self._stages.timings(self._answer, time.monotonic()),
            choice=self.choice,
        )
