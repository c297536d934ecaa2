"""The engine: one `step()` admits at most one request and gives every running one its next token.

It knows nothing of threads, event loops or the wire: its owner calls `step()`, chunks go into sinks.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trimserve.engine.kv_pool import KVPool
from trimserve.engine.memory import is_out_of_memory
from trimserve.engine.model import Model
from trimserve.engine.preparation import Preparation
from trimserve.engine.request import GenerationRequest
from trimserve.engine.sampling import SampledToken, sample
from trimserve.engine.scheduler import Scheduler
from trimserve.engine.sequence import Sequence, Sink
from trimserve.errors import OutOfMemory, RequestFailed, TrimserveError
from trimserve.models.info import ModelInfo

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Generates for several requests at once; what goes wrong in one of them ends that one alone."""

    def __init__(self, model: Model, *, max_batch: int) -> None:
        """Start with nothing to do.

        Args:
            model: decodes a batch.
            max_batch: requests that decode at the same time, at least 1.
        """
        info = model.info
        self.pool = KVPool(info, getattr(torch, info.dtype), torch.device(info.device))
        """KV of the running requests."""
        self._model = model
        self._scheduler = Scheduler(max_batch)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._model.info

    def preparation(self, request: GenerationRequest, sink: Sink, submitted_at: float) -> Preparation:
        """What makes a sequence of a request, step by step; any thread may take the steps.

        Args:
            request: what was asked.
            sink: will take the chunks, in `step`.
            submitted_at: `time.monotonic()` when the request came.
        """
        return Preparation(self._model, request, sink, submitted_at)

    def prepare(self, request: GenerationRequest, sink: Sink, submitted_at: float) -> Sequence:
        """All steps of `preparation` at once.

        Returns:
            What `add` takes.
        Raises:
            InvalidRequest: see `Preparation.advance`.
        """
        preparation = self.preparation(request, sink, submitted_at)
        while (sequence := preparation.advance()) is None:
            pass
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a prepared sequence."""
        self._scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now and say nothing more to its sink; nothing happens when it has ended before."""
        self._scheduler.remove(sequence)
        sequence.release()

    def step(self) -> None:
        """Admit and prefill at most one request, then decode one token of every running request."""
        with torch.inference_mode():
            admitted = self._scheduler.admit()
            if admitted is not None:
                self._prefill(admitted)
            if self._scheduler.running:
                self._decode(list(self._scheduler.running))

    def _prefill(self, sequence: Sequence) -> None:
        with self._alone(sequence):
            sequence.hold(self.pool)
            prompt = sequence.take_prompt()
            features = self._model.encode_images(prompt)
            sequence.encoded()
            prefilled = self._model.prefill(prompt, features, sequence.trim, sequence.kv)
            sequence.sink(sequence.started(prefilled, self.pool))
            [outcome] = sample(prefilled.logits[None], [sequence.sampling])
            self._emit(sequence, outcome)

    def _decode(self, batch: list[Sequence]) -> None:
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

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """Let an exception end this sequence and no other."""
        try:
            yield
        except Exception as error:
            log.exception("request %s failed", sequence.request_id)
            self.cancel(sequence)
            sequence.sink(self._as_own(error, sequence))

    def _as_own(self, error: Exception, sequence: Sequence) -> TrimserveError:
        if isinstance(error, TrimserveError):
            return error
        if is_out_of_memory(error):
            needed, held = self._max_kv_bytes(sequence), self.pool.used_self_bytes + self.pool.used_cross_bytes
            return OutOfMemory(
                f"out of memory on request {sequence.request_id}: its KV takes up to {needed} bytes beside the {held} "
                "bytes of others"
            )
        return RequestFailed(f"the model failed on request {sequence.request_id}")

    def _max_kv_bytes(self, sequence: Sequence) -> int:
        info = self.info
        num_images = sequence.sampling.prompt_token_ids.count(info.image_token_id)
        max_features = num_images * info.max_tiles * info.features_per_tile
        num_positions = sequence.num_prompt_tokens + sequence.max_new_tokens
        return self.pool.self_bytes(num_positions) + self.pool.cross_bytes(max_features)
