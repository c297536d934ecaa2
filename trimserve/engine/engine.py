"""The engine: each `step()` works on the next request for a bounded time and gives every running one its next token.

Vision encoding and prefill are interrupted between layers, so that running streams wait no longer than the bound and
one layer. One request is prefilled at a time. It knows nothing of threads, event loops or the wire: its owner calls
`step()`, chunks go into sinks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.status import StepListener
from trimserve.engine.kv_pool import KVPool
from trimserve.engine.memory import available_bytes, default_kv_cache_bytes, is_out_of_memory, prefill_scratch_bytes
from trimserve.engine.model import Model
from trimserve.engine.pace import Pace
from trimserve.engine.preparation import Preparation
from trimserve.engine.scheduler import Scheduler
from trimserve.engine.sequence import Sequence, Sink
from trimserve.errors import CheckpointError, DeadlinePassed, InvalidRequest, OutOfMemory, RequestFailed, TrimserveError
from trimserve.executor.image_cache import ImageCache
from trimserve.executor.sampling import SampledToken, sample
from trimserve.model.interruptible import Interruptible
from trimserve.trimming.encoded_image import EncodedImage, Observation

if TYPE_CHECKING:  # loads transformers, which the engine does without
    from trimserve.model.images import PreparedImage

__all__ = ["Engine"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prefill:
    """The request that is being prefilled."""

    sequence: Sequence
    work: Interruptible[None]
    seconds: float = 0.0
    """Worked on it until now."""


class Engine:
    """Generates for several requests at once; what goes wrong in one of them ends that one alone."""

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int,
        kv_cache_bytes: int | None = None,
        kv_layers_per_page: int | None = None,
        image_cache_bytes: int = 0,
        prefill_slice_seconds: float = 0.1,
        on_step: StepListener | None = None,
    ) -> None:
        """Start with nothing to do.

        Args:
            model: decodes a batch.
            max_batch: requests that decode at the same time, at least 1.
            kv_cache_bytes: of the page pool and the prefill scratch; None takes what the memory allows.
            kv_layers_per_page: see `key_values.layers_per_page`.
            image_cache_bytes: of visual features kept for another question on the same image; 0 keeps none.
            prefill_slice_seconds: how long a step may work on the next request, at least 0; it finishes the layer
                that it has begun.
            on_step: called in `step`.
        Raises:
            CheckpointError: `kv_cache_bytes` does not even hold the prefill scratch and a page, or
                `kv_layers_per_page` does not fit the model.
        """
        self.image_cache = ImageCache(image_cache_bytes)
        """Features of images seen before."""
        self.step_began_at: float | None = None
        """`time.monotonic()` when the step began that is being taken; None between two steps."""
        self._model = model
        self._max_batch = max_batch
        self._kv_cache_bytes = kv_cache_bytes
        self._kv_layers_per_page = kv_layers_per_page
        self._prefill_slice_seconds = prefill_slice_seconds
        self._on_step = on_step
        self._scheduler = Scheduler(max_batch)
        self._prefill: _Prefill | None = None
        self._pace = Pace()
        self._make_pool()

    def warmed_up(self) -> None:
        """Make the page pool again, of what memory the model leaves, and decode steps ready; forget how slow it began.

        Nothing may run.

        Raises:
            CheckpointError: see `Engine`.
        """
        self._pace = Pace()
        del self.pool  # before there is another: together they may be more than the memory
        self._make_pool()
        self._model.warm_up_decode(self.pool.pages, self._max_batch)

    def _make_pool(self) -> None:
        info, wanted = self.info, self._kv_cache_bytes
        if wanted is None:
            wanted = default_kv_cache_bytes(info, self._max_batch, available_bytes(info.device))
        scratch = prefill_scratch_bytes(info)
        try:
            self.pool = KVPool(info, wanted - scratch, self._kv_layers_per_page)
            """KV of the running requests."""
        except ValueError as error:
            raise CheckpointError(f"kv_layers_per_page: {error}") from error
        if not self.pool.num_pages:
            raise CheckpointError(
                f"kv_cache_bytes: must be at least {scratch + self.pool.page_bytes}, the scratch of a prefill with "
                f"{info.max_images} images (max_images) and a page, got {wanted}"
            )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._model.info

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
            deadline: `time.monotonic()` after which nobody wants the answer; None: never.
            images_taken: called in `step` when the engine begins to work on the request's images.
        """
        model = self._model

        def make(token_ids: tuple[int, ...]) -> Sequence:
            return Sequence(request, token_ids, model.info, model.tokenizer, sink, submitted_at, deadline, images_taken)

        return Preparation(model, request.prompt, make, self._check_that_it_fits)

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
        """End a sequence now and say nothing more to its sink; nothing happens when it has ended before."""
        self._scheduler.remove(sequence)
        if self._prefill is not None and self._prefill.sequence is sequence:
            self._prefill = None
        sequence.release()

    def step(self) -> None:
        """Work on the next request for a slice of time, then decode one token of every running one."""
        self.step_began_at = time.monotonic()
        with torch.inference_mode():
            self._advance()
            batch = [sequence for sequence in self._scheduler.running if not self._is_in_prefill(sequence)]
            if batch:
                self._decode(batch)
        self.step_began_at = None

    def _is_in_prefill(self, sequence: Sequence) -> bool:
        return self._prefill is not None and self._prefill.sequence is sequence

    def _advance(self) -> None:
        end = time.monotonic() + self._prefill_slice_seconds
        while self._prefill is not None or self._admit():
            assert self._prefill is not None
            self._prefill_layer(self._prefill)
            if time.monotonic() >= end:
                return

    def _admit(self) -> bool:
        """Begin with the head of the queue, if there are pages for all that it may hold."""
        while (sequence := self._scheduler.next) is not None:
            late = self._lateness(sequence)
            if late is None:
                if self._most_pages(sequence) > self.pool.num_free_pages:
                    return False
                self._scheduler.admit()
                sequence.hold(self.pool)
                self._prefill = _Prefill(sequence, self._work(sequence))
                return True
            self.cancel(sequence)
            sequence.sink(late)
        return False

    def _prefill_layer(self, prefill: _Prefill) -> None:
        started_at = time.monotonic()
        sequence, done = prefill.sequence, object()
        with self._alone(sequence):
            is_done = next(prefill.work, done) is done
            prefill.seconds += time.monotonic() - started_at
            if is_done:
                self._pace.saw_prefill(sequence.num_prompt_rows, prefill.seconds)
                self._prefill = None

    def _work(self, sequence: Sequence) -> Interruptible[None]:
        prompt = sequence.take_prompt()
        images: list[EncodedImage] = []
        for image in prompt.images:
            encoded = yield from self._encoded(image, sequence.trim.needs)
            images.append(encoded)
        sequence.encoded()
        prefilled = yield from self._model.prefill(prompt, images, sequence.trim, sequence.kv)
        sequence.sink(sequence.started(prefilled, self.pool))
        [outcome] = sample(prefilled.logits[None], [sequence.sampling])
        self._emit(sequence, outcome)

    def _encoded(self, image: "PreparedImage", needs: frozenset[Observation]) -> Interruptible[EncodedImage]:
        encoded = self.image_cache.get(image.key, needs)
        if encoded is None:
            encoded = yield from self._model.encode_image(image, needs)
            self.image_cache.put(image.key, encoded)
        return encoded

    def _decode(self, batch: list[Sequence]) -> None:
        started_at = time.monotonic()
        lengths = [sequence.kv.length for sequence in batch]
        try:
            outcomes = self._next_tokens(batch)
        except Exception:
            log.exception("decoding a batch of %d failed; each is tried alone", len(batch))
            for sequence, length in zip(batch, lengths, strict=True):
                with self._alone(sequence):
                    sequence.kv.length = length
                    self._emit(sequence, *self._next_tokens([sequence]))
            return
        seconds = time.monotonic() - started_at
        self._pace.saw_step(seconds)
        if self._on_step is not None:
            self._on_step(len(batch), seconds)
        for sequence, outcome in zip(batch, outcomes, strict=True):
            with self._alone(sequence):
                self._emit(sequence, outcome)

    def _next_tokens(self, batch: list[Sequence]) -> list[SampledToken | RequestFailed]:
        last_token_ids = [sequence.sampling.generated_token_ids[-1] for sequence in batch]
        logits = self._model.decode(last_token_ids, [sequence.kv for sequence in batch])
        return sample(logits, [sequence.sampling for sequence in batch])

    def _emit(self, sequence: Sequence, outcome: SampledToken | RequestFailed) -> None:
        if isinstance(outcome, RequestFailed):
            raise outcome
        sequence.sink(sequence.append(outcome))
        if sequence.finish_reason is not None:
            self.cancel(sequence)
            sequence.sink(sequence.finished())

    def _most_pages(self, sequence: Sequence) -> int:
        return self.pool.self_pages(sequence.max_positions) + self.pool.cross_pages(sequence.max_cross_rows)

    def _check_that_it_fits(self, sequence: Sequence) -> None:
        """Refuse what even an empty pool cannot hold.

        Raises:
            InvalidRequest: naming the bytes, and what would make it fit.
        """
        pool = self.pool
        needed = self._most_pages(sequence) * pool.page_bytes
        if needed <= pool.capacity_bytes:
            return
        of_images = pool.cross_bytes(sequence.max_cross_rows)
        has_larger_images = of_images > needed - of_images
        advice = "a smaller trim.max_kept_fraction" if has_larger_images else "a smaller sampling.max_new_tokens"
        raise InvalidRequest(
            "trim.max_kept_fraction" if has_larger_images else "sampling.max_new_tokens",
            f"the request needs up to {needed} bytes of KV, {of_images} of them for its images, and the server has "
            f"{pool.capacity_bytes}; {advice}, or a larger kv_cache_bytes of the server, would make it fit",
        )

    def _lateness(self, sequence: Sequence) -> DeadlinePassed | None:
        """Why there is no point in beginning: the deadline comes before the fastest possible end."""
        if sequence.deadline is None:
            return None
        left = sequence.deadline - time.monotonic()
        least = self._pace.least_seconds(sequence.num_prompt_rows, sequence.least_new_tokens)
        if least <= left:
            return None
        return DeadlinePassed(
            f"the deadline cannot be met: {left:.3f} s are left and {least:.3f} s are needed at least"
        )

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """Let an exception end this sequence and no other."""
        try:
            yield
        except Exception as error:
            log.exception("request failed", extra={"request_id": sequence.request_id})
            needed = self._most_pages(sequence) * self.pool.page_bytes
            self.cancel(sequence)
            sequence.sink(_as_own(error, sequence, needed))


def _as_own(error: Exception, sequence: Sequence, num_bytes: int) -> TrimserveError:
    if isinstance(error, TrimserveError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory on request {sequence.request_id}: its KV takes up to {num_bytes} bytes")
    return RequestFailed(f"the model failed on request {sequence.request_id}")
