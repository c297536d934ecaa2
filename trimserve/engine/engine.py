"""The engine: decides what runs next, and says what became of it.

Each `step()` plans work for an executor: a slice of the next prompt, so that running streams wait no longer than the
slice and one layer, then a new token for every running sequence, and further ones where drafts were right. It owns the
sequences, their order and their pages; it knows no tensor, thread, event loop or wire. Its owner calls `step()`; chunks
go into sinks.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trimserve.api.adapter import AdapterInfo
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.status import StepListener
from trimserve.config import EngineConfig
from trimserve.engine.detokenizer import token_bytes
from trimserve.engine.joining import lateness, may_share_pass
from trimserve.engine.limits import check_that_it_fits
from trimserve.engine.memory import available_bytes, check_room_for_adapter, make_pool
from trimserve.engine.next_rows import rows_ahead, with_room
from trimserve.engine.pace import Pace
from trimserve.engine.preparation import Preparation
from trimserve.engine.processor import Processor
from trimserve.engine.repeats import Repeats
from trimserve.engine.scheduler import Scheduler
from trimserve.engine.sequence import Sequence, SequenceState, Sink
from trimserve.engine.speculation import Speculation
from trimserve.errors import InvalidRequest, OutOfMemory, RequestFailed, TrimserveError
from trimserve.executor.drafter import Drafter
from trimserve.executor.executor import Executor
from trimserve.executor.plan import (
    Drawn,
    Failed,
    ImageCacheCounts,
    PageGrant,
    PrefillReport,
    PrefillSlice,
    Rows,
    StepPlan,
    StepResult,
)

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Generates for several requests at once; what goes wrong in one of them ends that one alone."""

    def __init__(
        self,
        processor: Processor,
        executor: Executor,
        config: EngineConfig,
        on_step: StepListener | None = None,
        clock: Callable[[], float] = time.monotonic,
        drafter: Drafter | None = None,
    ) -> None:
        """Start with nothing to do.

        Args:
            processor: prepares requests.
            executor: runs plans; nobody else uses it.
            config: how much to take on.
            on_step: called in `step` after every decode step.
            clock: seconds, by which steps are timed and deadlines pass.
            drafter: in place of the look-up that `config.speculation` turns on.
        Raises:
            CheckpointError: `kv_cache_bytes` does not even hold the prefill scratch and a page.
        """
        self.image_cache = ImageCacheCounts()
        """Of the executor's cache, after the last step."""
        self.num_preemptions = 0
        """Times that a sequence was preempted."""
        self.num_recomputed_tokens = 0
        """Tokens of prompts and answers that were read once more after a preemption."""
        self.num_prefill_passes = 0
        """Passes over the layers that read prompts, one or several each."""
        self.step_began_at: float | None = None
        """When the present step began; None between steps."""
        self._processor = processor
        self._executor = executor
        self._config = config
        self._on_step = on_step
        self._clock = clock
        self._scheduler = Scheduler(config.max_batch)
        self._numbers = itertools.count()
        self._sequences: dict[int, Sequence] = {}
        """Those that the executor knows, by number."""
        self._prefills: list[Sequence] = []
        """The sequences whose prompts are being read, in one pass those that are ready for it."""
        self._ended: list[int] = []
        """Numbers that the executor is yet to forget."""
        self._begun: frozenset[int] = frozenset()
        """See `StepResult.begun`."""
        self._pace = Pace()
        self.speculation = Speculation(drafter or (Repeats() if config.speculation else None), config.max_batch)
        """Drafts of tokens that several rows of a step check."""
        self._make_pool()

    def resize_after_warm_up(self) -> None:
        """Size the page pool by the memory that is left now, make decode steps ready, forget the first times.

        Nothing may run.

        Raises:
            CheckpointError: see `Engine`.
        """
        self._pace = Pace()
        self._executor.free_pages()  # or what they hold would count as taken
        self._make_pool()
        self._executor.warm_up(self.speculation.most_rows)

    def _make_pool(self) -> None:
        self.pool = make_pool(self.info, self._config, self.speculation.most_rows, available_bytes(self.info.device))
        """Pages of the running sequences."""
        self._executor.allocate(self.pool.num_pages, self.pool.layers_per_page)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._executor.info

    def preparation(
        self,
        request: GenerationRequest,
        sink: Sink,
        submitted_at: float,
        deadline: float | None = None,
        images_taken: Callable[[], None] | None = None,
    ) -> Preparation:
        """What makes a sequence of a request, step by step; any thread may take the steps.

        Args:
            request: what was asked.
            sink: will take the chunks, in `step`.
            submitted_at: `time.monotonic()` when the request came.
            deadline: `time.monotonic()` after which nobody wants the answer; None for never.
            images_taken: called in `step` when work on the request's images begins.
        """
        tokenizer, constraint = self._processor.tokenizer, request.constraint

        def make(token_ids: tuple[int, ...]) -> Sequence:
            """Called by a worker thread once the prompt is tokenised."""
            made = Sequence(request, token_ids, self.info, tokenizer, sink, submitted_at, deadline, images_taken)
            if constraint is not None:
                self._executor.compile(constraint)
            return made

        return Preparation(self._processor, request.prompt, make, self._check_that_it_fits)

    def token_bytes(self, token_ids: Iterable[int]) -> tuple[bytes, ...]:
        """What each token adds to a text; see `detokenizer.token_bytes`."""
        return tuple(token_bytes(self._processor.tokenizer, token_id) for token_id in token_ids)

    def prepare(
        self, request: GenerationRequest, sink: Sink, submitted_at: float, deadline: float | None = None
    ) -> Sequence:
        """All steps of `preparation` at once.

        Returns:
            What `add` takes.
        Raises:
            InvalidRequest: see `Preparation.advance`.
        """
        preparation = self.preparation(request, sink, submitted_at, deadline)
        while (sequence := preparation.advance()) is None:
            pass
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a prepared sequence."""
        self._scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a request now, all of its answers, and say nothing more to its sink; one that has ended stays so."""
        for each in sequence.family:
            self._end(each)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages away; it is computed again, from what is kept of it, when there is room."""
        self.num_preemptions += 1
        sequence.was_preempted = True
        self._scheduler.send_back(sequence)
        self._let_go(sequence)

    def step(self) -> None:
        """Work on the next prompt for a slice of time, then decode every running sequence."""
        self.step_began_at = self._clock()
        grown = self._grow()
        self._read_prompts()
        batch = [sequence for sequence in self._scheduler.running if sequence not in self._prefills]
        if batch:
            self._decode(batch, grown)
        self._tell_what_ended()
        self.step_began_at = None

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Read an adapter beside the steps; on any thread. See `Executor.load_adapter`.

        Raises:
            AdapterError: it cannot be used with this model.
            OutOfMemory: there is less memory than its file takes.
        """
        check_room_for_adapter(name, folder, available_bytes(self.info.device))
        return self._executor.load_adapter(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no sequence has any more."""
        self._tell_what_ended()
        self._executor.unload_adapter(name)

    # ---- planning ----

    def _grow(self) -> set[Sequence]:
        """Give every running sequence a page for its next token; where there are too few, the least urgent wait again.

        The most urgent one is never among these, and fits into the pool alone. So each step brings it on, and everybody
        is the most urgent one in the end.

        Returns:
            Those whose new pages the executor is yet to hear of.
        """
        grown, urgent = set(), self._scheduler.by_urgency()
        place = 0
        while place < len(urgent):
            pages, wanted = urgent[place].pages, urgent[place].num_tokens
            missing = pages.missing_pages(wanted)
            if missing > self.pool.num_free_pages:
                self.preempt(urgent.pop())
                continue
            if missing:
                pages.grow(wanted)
                grown.add(urgent[place])
            place += 1
        return grown

    def _read_prompts(self) -> None:
        end = self._clock() + self._config.prefill_slice_seconds
        while True:
            plan = StepPlan() if self._prefills else self._admit()
            if not self._prefills:
                return
            numbers = tuple(sequence.number for sequence in self._prefills)
            self._run(replace(plan, prefill=PrefillSlice(numbers, max(0.0, end - self._clock()))))
            if self._clock() >= end:
                return

    def _admit(self) -> StepPlan:
        """Begin with the head of the queue, and what may share its pass; each if there are pages, and a little more."""
        plan = StepPlan()
        while (sequence := self._scheduler.next) is not None and may_share_pass([*self._prefills, sequence], self.info):
            late = lateness(sequence, self._pace, self._clock())
            if late is None:
                is_short = sequence.pages_to_join(self.pool) > self.pool.num_free_pages
                if is_short and self._scheduler.running:  # else it fits, if not with all of its answers
                    break
                self._scheduler.admit()
                number = next(self._numbers)
                new = replace(sequence.admitted(number, self.pool), wants_forced=self.speculation.is_on)
                self._sequences[number] = sequence
                self._prefills.append(sequence)
                plan = replace(plan, new=(*plan.new, new), pages=(*plan.pages, _grant(sequence)))
                continue
            self.cancel(sequence)
            sequence.sink(late)
        return plan

    def _decode(self, batch: list[Sequence], grown: set[Sequence]) -> None:
        # Who joined since a step was begun ahead takes part in the one after it.
        going = [each for each in batch if each.number in self._begun] or batch
        chosen = self.speculation.drafts(going)
        drafts = {each: with_room(self.pool, each, own, grown) for each in going if (own := chosen.get(each.number))}
        rows = tuple(Rows(each.number, each.num_positions, drafts=drafts.get(each, ())) for each in going)
        ahead: tuple[Rows, ...] = ()
        if self._executor.runs_ahead and not self.speculation.is_on:
            ahead = rows_ahead(self.pool, batch, {*going}, grown)
        pages = tuple(_grant(each) for each in batch if each in grown)
        result = self._run(StepPlan(pages=pages, rows=rows, ahead=ahead))
        self._begun = frozenset(result.begun)
        self.speculation.saw(rows, result)
        if result.rows_seconds:  # a batch that failed says nothing of the pace
            most = max(Counter(drawn.sequence for drawn in result.drawn).values(), default=1) if drafts else 1
            self._pace.saw_token(result.rows_seconds / most)
            if self._on_step is not None:
                self._on_step(len(going), result.rows_seconds)

    # ---- results ----

    def _run(self, plan: StepPlan) -> StepResult:
        ended, self._ended = tuple(self._ended), []
        result = self._executor.run(replace(plan, ended=ended))
        self.image_cache = result.image_cache
        self.num_prefill_passes += bool(result.prefilled)
        for report in result.prefilled:
            self._take_prefilled(report)
        for failed in result.failed:
            self._take_failed(failed)
        # Who they are first: an answer may end with the first token of all.
        for sequence, drawn in [(self._sequences.get(drawn.sequence), drawn) for drawn in result.drawn]:
            if sequence is not None:  # else it failed meanwhile
                self._take_drawn(sequence.family[drawn.choice] if drawn.choice else sequence, drawn)
        return result

    def _take_prefilled(self, report: PrefillReport) -> None:
        sequence = self._sequences[report.sequence]
        self._prefills.remove(sequence)
        if sequence.was_preempted:
            self.num_recomputed_tokens += sequence.num_tokens_to_read
        with self._alone(sequence):
            if (started := sequence.prefilled(report, self.pool)) is not None:
                self._pace.saw_prefill(sequence.num_prompt_rows, report.seconds)
                sequence.sink(started)

    def _take_drawn(self, sequence: Sequence, drawn: Drawn) -> None:
        if sequence.state is SequenceState.ENDED:  # with an answer to the same request that failed
            return
        with self._alone(sequence):
            sequence.sink(sequence.append(drawn))
            if sequence.finish_reason is not None:
                self._end(sequence)
                sequence.sink(sequence.finished())
            elif not sequence.holds_pages:  # another answer, which has its first token
                self._scheduler.add(sequence)
            else:
                self.speculation.expect(sequence.number, drawn.forced)

    def _take_failed(self, failed: Failed) -> None:
        sequence = self._sequences.get(failed.sequence)
        if sequence is None:
            return
        error: TrimserveError = RequestFailed(failed.message)
        if failed.field is not None:
            error = InvalidRequest(failed.field, failed.message)
        if failed.is_out_of_memory:
            most = self.pool.self_bytes(sequence.max_positions) + self.pool.cross_bytes(sequence.max_cross_rows)
            error = OutOfMemory(f"{failed.message}: its KV takes up to {most} bytes")
        self.cancel(sequence)
        sequence.sink(error)

    def _tell_what_ended(self) -> None:
        if self._ended:
            self._run(StepPlan())

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Give back what a sequence holds, here and in the executor."""
        if sequence in self._prefills:
            self._prefills.remove(sequence)
        if sequence.holds_pages:
            self._ended.append(sequence.number)
            self.speculation.forget(sequence.number)
            del self._sequences[sequence.number]
            sequence.release()
        if sequence.state is SequenceState.ENDED:
            sequence.forget()

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """Let an exception end this sequence's request and no other."""
        try:
            yield
        except Exception as error:
            log.exception("request failed", extra={"request_id": sequence.request_id})
            self.cancel(sequence)
            if not isinstance(error, TrimserveError):
                error = RequestFailed(f"the engine failed on request {sequence.request_id}")
            sequence.sink(error)

    # ---- bounds ----

    def _check_that_it_fits(self, sequence: Sequence) -> None:
        check_that_it_fits(self.pool, sequence.max_positions, sequence.max_cross_rows)


def _grant(sequence: Sequence) -> PageGrant:
    pages = sequence.pages
    return PageGrant(sequence.number, pages.self_tables, pages.cross_tables)
