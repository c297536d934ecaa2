"""An executor in this process: a model, the memory of pages and images, and what each sequence has drawn."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trimserve.api.adapter import AdapterInfo
from trimserve.api.constraint import Constraint
from trimserve.api.info import ModelInfo
from trimserve.api.sampling import SamplingParams
from trimserve.errors import TrimserveError
from trimserve.executor.ahead import Ahead
from trimserve.executor.drawing import Answer, draw, take
from trimserve.executor.failures import is_device_error, is_out_of_memory
from trimserve.executor.grammar import Grammars
from trimserve.executor.guide import Guides
from trimserve.executor.image_cache import ImageCache
from trimserve.executor.model import Model
from trimserve.executor.page_memory import page_memory
from trimserve.executor.plan import (
    Drawn,
    Failed,
    NewSequence,
    PageGrant,
    PrefillReport,
    PrefillSlice,
    Rows,
    StepPlan,
    StepResult,
)
from trimserve.executor.prefill_report import prefill_report
from trimserve.executor.reading import Held, PromptReader
from trimserve.executor.sampling import SamplingState, has_penalty
from trimserve.executor.steps_ahead import Row, StepsAhead
from trimserve.model.adapters import Adapter
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled

__all__ = ["LocalExecutor"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Step:
    """The result of a step as it comes about."""

    prefilled: list[PrefillReport] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    rows_seconds: float = 0.0

    def add(self, results: Iterable[Drawn | Failed]) -> None:
        """Take what was drawn, and who failed."""
        for each in results:
            if isinstance(each, Drawn):
                self.drawn.append(each)
            else:
                self.failed.append(each)


class LocalExecutor:
    """Runs plans on a model of this process; see `Executor`."""

    def __init__(
        self,
        model: Model,
        image_cache_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        is_fatal: Callable[[BaseException], bool] = is_device_error,
        runs_ahead: bool | None = None,
    ) -> None:
        """Hold no pages yet.

        Args:
            model: nothing else uses it meanwhile.
            image_cache_bytes: of visual features kept for another question on the same image; 0 keeps none.
            clock: seconds, by which slices end and rows are timed.
            is_fatal: tells errors that end the executor from those that end one sequence.
            runs_ahead: see `Executor.runs_ahead`; None does where it pays, on a GPU.
        """
        device = torch.device(model.info.device)
        self.runs_ahead = device.type == "cuda" if runs_ahead is None else runs_ahead
        """See `Executor.runs_ahead`."""
        self.pages: Tensor | None = None
        """See `page_memory`; None before `allocate`."""
        self._model = model
        self._clock = clock
        self._is_fatal = is_fatal
        self._images = ImageCache(image_cache_bytes)
        self._sequences: dict[int, Held] = {}
        self._adapters: dict[str, Adapter] = {}
        self._ahead = Ahead(device)
        self._steps = StepsAhead(model.decode, device)
        self._grammars = Grammars(model.tokenizer, model.info)
        self._guides = Guides(self._grammars, model.info)
        self._reader = PromptReader(model, self._images)

    @property
    def info(self) -> ModelInfo:
        """See `Executor.info`."""
        return self._model.info

    def allocate(self, num_pages: int, layers_per_page: int) -> None:
        """See `Executor.allocate`; on a CPU memory is only taken once a page is written."""
        self.free_pages()  # the old pages and the new ones may not fit together
        self.pages = page_memory(self.info, num_pages, layers_per_page)

    def free_pages(self) -> None:
        """See `Executor.free_pages`."""
        assert not self._sequences, "pages are made anew only while no sequence is known"
        self.pages = None

    def warm_up(self, max_batch: int) -> None:
        """See `Executor.warm_up`."""
        assert self.pages is not None, "pages are allocated first"
        self._model.warm_up_decode(self.pages, max_batch)
        self._grammars.warm_up()

    @torch.inference_mode()
    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """See `Executor.load_adapter`."""
        adapter = self._model.load_adapter(folder)
        self._adapters[name] = adapter
        return AdapterInfo(
            name=name,
            folder=str(folder),
            num_bytes=adapter.nbytes,
            rank=adapter.rank,
            modules=adapter.modules,
            changes_image_features=bool(adapter.image_key),
        )

    def unload_adapter(self, name: str) -> None:
        """See `Executor.unload_adapter`."""
        adapter = self._adapters.pop(name)
        self._model.forget_adapter(adapter)
        if adapter.image_key:
            self._images.drop(lambda key: key.startswith(adapter.image_key))
        if adapter.kv_key:
            self._images.drop_keys_values(adapter.kv_key)

    def compile(self, constraint: Constraint) -> None:
        """See `Executor.compile`."""
        self._grammars.matcher(constraint)

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """See `Executor.watch`; what fails here fails in a step."""

    def close(self) -> None:
        """See `Executor.close`; nothing runs beside this process."""

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See `Executor.run`."""
        for number in plan.ended:
            self._forget(number)
        for new in plan.new:
            self._sequences[new.sequence] = self._begin(new, new.sampling)
        for grant in plan.pages:
            self._grant(grant)
        step = _Step()
        if plan.prefill is not None:
            self._go_on_with_prompts(plan.prefill, step)
        if plan.rows:
            self._run_rows(plan.rows, plan.ahead, step)
        drawn, failed = tuple(step.drawn), tuple(step.failed)
        return StepResult(
            tuple(step.prefilled), drawn, failed, step.rows_seconds, self._steps.begun, self._images.counts
        )

    def _begin(self, new: NewSequence, params: SamplingParams, choice: int = 0) -> Held:
        generated = list(new.generated_token_ids)
        state = SamplingState(params, new.prompt.token_ids, new.end_token_ids, generated)
        guide = None
        if new.constraint is not None:
            guide = self._guides.begin(new.constraint, params, new.end_token_ids, generated)
        return Held(new, Answer(new.sequence, new.request_id, state, guide, choice, new.wants_forced))

    def _forget(self, number: int) -> None:
        held = self._sequences.pop(number, None)
        self._steps.forget(number)
        if held is not None:
            self._reader.forget(held)

    def _grant(self, grant: PageGrant) -> None:
        assert self.pages is not None, "pages are allocated first"
        held = self._sequences[grant.sequence]
        if held.kv is None and held.new.shares is not None:
            source, num_positions = self._sequences[held.new.shares].pages, len(held.new.prompt.token_ids)
            held.kv = source.branch(grant.self_pages, grant.cross_pages, num_positions)
        elif held.kv is None:
            num_cross = self.info.num_cross_attention_layers
            adapter = self._adapter_of(held)
            held.kv = KeyValues.empty(self.pages, grant.self_pages, grant.cross_pages, num_cross, adapter)
        else:
            held.kv.replace_tables(grant.self_pages, grant.cross_pages)

    def _adapter_of(self, held: Held) -> Adapter | None:
        return None if held.new.adapter is None else self._adapters[held.new.adapter]

    # ---- prompts ----

    def _go_on_with_prompts(self, wanted: PrefillSlice, step: _Step) -> None:
        end = self._clock() + wanted.seconds
        waiting = [self._sequences[number] for number in wanted.sequences]
        while True:
            started_at = self._clock()
            read = self._read_on(waiting, step)
            if read is None:
                return
            self._ahead.queued()
            members = self._reader.members
            share = (self._clock() - started_at) / len(members)
            for held in members:
                held.seconds += share
            for held, prefilled in read:
                report = prefill_report(held.new.sequence, prefilled, held.pages, held.times)
                step.prefilled.append(replace(report, seconds=held.seconds))
                if not held.has_generated:
                    with self._alone(held.new, step):
                        self._draw_first(prefilled.logits, held, step)
            if read or self._clock() >= end:
                return

    def _read_on(self, waiting: Sequence[Held], step: _Step) -> list[tuple[Held, Prefilled]] | None:
        """See `PromptReader.go_on`; None if a prompt failed. Of several in one pass each is tried alone first."""
        try:
            return self._reader.go_on(waiting)
        except Exception as error:
            if self._is_fatal(error):
                raise
            members = self._reader.members
            if len(members) == 1:
                step.failed.append(_failure(members[0].new, error))
                return None
            log.exception("reading %d prompts together failed; each is tried alone", len(members))
            for held in members:
                held.is_alone = True
            return []

    # ---- rows ----

    def _run_rows(self, rows: Sequence[Rows], ahead: Sequence[Rows], step: _Step) -> None:
        started_at = self._clock()
        batch = [self._sequences[each.sequence] for each in rows]
        if self._run_foreseen(rows, ahead, step):
            step.rows_seconds = self._steps.seconds or self._clock() - started_at
            return
        for each, held in zip(rows, batch, strict=True):
            if each.drafts and held.answer.guide is not None:
                self._guides.look_ahead(held.answer.guide, each.drafts)
        try:
            logits = self._logits(rows, batch)
        except Exception as error:
            if self._is_fatal(error):
                raise
            log.exception("decoding a batch of %d failed; each is tried alone", len(batch))
            for each, held in zip(rows, batch, strict=True):
                with self._alone(held.new, step):
                    plain = replace(each, drafts=())
                    self._draw(self._logits([plain], [held]), [plain], [held], step)
            return
        self._draw(logits, rows, batch, step)
        step.rows_seconds = self._clock() - started_at

    def _run_foreseen(self, rows: Sequence[Rows], ahead: Sequence[Rows], step: _Step) -> bool:
        """Run rows that were begun, or behind which others can begin before tokens are known; whether it did."""
        if not (self.runs_ahead and all(map(self._is_foreseen, (*rows, *ahead)))):
            ahead = ()
        if not ahead and not {each.sequence for each in rows} <= {*self._steps.begun}:
            self._steps.drop()
            return False
        try:
            sampled = self._steps.run([*map(self._row, rows)], [*map(self._row, ahead)])
        except Exception as error:
            if self._is_fatal(error):
                raise
            log.exception("decoding a batch of %d failed; it is tried again", len(rows))
            return False
        answers = [self._sequences[each.sequence].answer for each in rows]
        step.add(take(sampled, answers, self._guides, [()] * len(rows)))
        return True

    def _is_foreseen(self, row: Rows) -> bool:
        """Whether the token behind a row can be drawn by a device that knows the row alone."""
        answer = self._sequences[row.sequence].answer
        knows_enough = answer.guide is None and not has_penalty(answer.sampling.params)
        return knows_enough and row.token_ids is None and not row.drafts

    def _row(self, row: Rows) -> Row:
        held = self._sequences[row.sequence]
        return Row(row.sequence, row.position, held.pages, held.answer.sampling)

    def _logits(self, rows: Sequence[Rows], batch: Sequence[Held]) -> Tensor:
        """After the last row of each sequence, and after each of its drafts; [R, vocab_size]."""
        token_ids: list[int] = []
        kvs, counts = [], []
        wanted: list[int] = []
        for each, held in zip(rows, batch, strict=True):
            new = held.answer.sampling.generated_token_ids[-1:] if each.token_ids is None else each.token_ids
            token_ids += [*new, *each.drafts]
            wanted += range(len(token_ids) - len(each.drafts) - 1, len(token_ids))
            kv = held.pages
            kv.length = each.position  # also of rows that are tried again, or behind drafts that were not drawn
            kvs.append(kv)
            counts.append(len(new) + len(each.drafts))
        if len(token_ids) == len(kvs):
            return self._model.decode(token_ids, kvs)
        logits = self._model.decode(token_ids, kvs, counts)
        return logits if len(wanted) == len(token_ids) else logits[wanted]

    def _draw_first(self, logits: Tensor, held: Held, step: _Step) -> None:
        """First tokens of all answers to a prompt, of the logits behind it."""
        new = held.new
        others = [self._begin(new, params, choice).answer for choice, params in enumerate(new.choices, start=1)]
        step.add(draw(logits.expand(1 + len(others), -1), [held.answer, *others], self._guides))

    def _draw(self, logits: Tensor, rows: Sequence[Rows], batch: Sequence[Held], step: _Step) -> None:
        step.add(draw(logits, [held.answer for held in batch], self._guides, [each.drafts for each in rows]))

    @contextmanager
    def _alone(self, new: NewSequence, step: _Step) -> Iterator[None]:
        """Let an exception end this sequence and no other, unless it is fatal."""
        try:
            yield
        except Exception as error:
            if self._is_fatal(error):
                raise
            step.failed.append(_failure(new, error))


def _failure(new: NewSequence, error: Exception) -> Failed:
    """Log why a request ends, and say it."""
    log.error("request failed", exc_info=error, extra={"request_id": new.request_id})
    if is_out_of_memory(error):
        return Failed(new.sequence, f"out of memory on request {new.request_id}", is_out_of_memory=True)
    is_ours = isinstance(error, TrimserveError)
    return Failed(new.sequence, str(error) if is_ours else f"the model failed on request {new.request_id}")
