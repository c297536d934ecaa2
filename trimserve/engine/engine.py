"""The engine: one `step()` admits at most one request and gives every running one its next token.

It knows nothing of threads, event loops or the wire: its owner calls `step()`, chunks go into sinks.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimserve.engine.kv_pool import KVPool
from trimserve.engine.model import Model
from trimserve.engine.request import GenerationRequest
from trimserve.engine.sampling import SampledToken, sample
from trimserve.engine.scheduler import Scheduler
from trimserve.engine.sequence import Sequence, Sink
from trimserve.errors import RequestFailed, TrimserveError
from trimserve.models.info import ModelInfo

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Generates for several requests at once; what goes wrong in one of them ends that one alone."""

    def __init__(self, model: Model[Any], *, max_batch: int) -> None:
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

    def prepare(self, request: GenerationRequest, sink: Sink, submitted_at: float) -> Sequence:
        """Tokenise, decode images, check what only then is known. Changes nothing: any thread may call it.

        Args:
            request: what was asked.
            sink: will take the chunks, in `step`.
            submitted_at: `time.monotonic()` when the request came.
        Returns:
            What `add` takes.
        Raises:
            InvalidRequest: `Model.prepare` refuses, or the prompt leaves no room for the answer.
        """
        started_at = time.monotonic()
        prepared = self._model.prepare(request.prompt)
        return Sequence(
            request,
            prepared,
            self._model.info,
            self._model.tokenizer,
            sink,
            submitted_at=submitted_at,
            preprocess_seconds=time.monotonic() - started_at,
        )

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
            features = self._model.encode_images(sequence.prepared)
            sequence.encoded()
            prefilled = self._model.prefill(sequence.prepared, features, sequence.request.trim, sequence.kv)
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
            request_id = sequence.request.request_id
            log.exception("request %s failed", request_id)
            self.cancel(sequence)
            if isinstance(error, TrimserveError):
                sequence.sink(error)
            else:
                sequence.sink(RequestFailed(f"the model failed on request {request_id}"))
