"""The next decode step begun before the tokens of this one are read: a GPU computes while the host hands them out.

The next step's rows are the tokens that this one draws, taken where they are drawn: on the device. A sequence that
turns out to have ended was computed in vain, for one token; nothing that its row wrote is read again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimserve.errors import RequestFailed
from trimserve.executor.failures import is_device_error
from trimserve.executor.sampling import SampledToken, Sampling, SamplingState
from trimserve.model.key_values import KeyValues
from trimserve.ops.upload import upload_ids

__all__ = ["Row", "StepsAhead"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """The next row of a sequence."""

    sequence: int
    position: int
    kv: KeyValues
    sampling: SamplingState
    """By which the token behind the row is drawn; without penalties and constraints, which need to know all tokens."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that may still run on the device."""

    places: dict[int, int]
    """The row of each sequence."""
    sampling: Sampling
    began: torch.cuda.Event | None
    """When the device came to it; None on a CPU."""


class StepsAhead:
    """Runs steps, and holds the one that was begun."""

    def __init__(
        self, decode: Callable[[Sequence[int] | Tensor, Sequence[KeyValues]], Tensor], device: torch.device
    ) -> None:
        """Nothing has begun.

        Args:
            decode: see `Model.decode`.
            device: of the model.
        """
        self._decode = decode
        self._is_gpu = device.type == "cuda"
        self.seconds: float | None = None
        """That the device took for the step that was read last; None on a CPU."""
        self._begun: _Begun | None = None

    @property
    def begun(self) -> tuple[int, ...]:
        """Sequences whose next row was begun."""
        return () if self._begun is None else tuple(self._begun.places)

    def forget(self, sequence: int) -> None:
        """Nobody will ask for what was begun for a sequence."""
        if self._begun is not None:
            self._begun.places.pop(sequence, None)
            if not self._begun.places:
                self._begun = None

    def run(self, rows: Sequence[Row], ahead: Sequence[Row]) -> list[SampledToken | RequestFailed]:
        """Read the tokens behind rows, which may have been begun, once the rows behind them have begun.

        Args:
            rows: at least one; if some were begun, all of them were.
            ahead: of the next step; may be empty. Of a sequence in `rows` the position behind it.
        Returns:
            Of each of `rows`.
        Raises:
            Exception: as the model's and the device's. Nothing is begun then.
        """
        now, self._begun = self._begun, None
        if now is None or any(row.sequence not in now.places for row in rows):
            now = self._begin(rows, None)
        following = self._try_to_begin(ahead, now)
        drawn = now.sampling.read()
        if now.began is not None and now.sampling.ended is not None:
            self.seconds = now.began.elapsed_time(now.sampling.ended) / 1000
        if not now.sampling.was_redrawn:
            self._begun = following
        return [drawn[now.places[row.sequence]] for row in rows]

    def drop(self) -> None:
        """Nobody will ask for what was begun."""
        self._begun = None

    def _event(self) -> torch.cuda.Event | None:
        if not self._is_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _try_to_begin(self, rows: Sequence[Row], before: _Begun) -> _Begun | None:
        try:
            return self._begin(rows, before) if rows else None
        except Exception as error:
            if is_device_error(error):
                raise
            log.exception("beginning a step of %d ahead failed; it is run in its turn", len(rows))
            return None

    def _begin(self, rows: Sequence[Row], before: _Begun | None) -> _Begun:
        drawing = {} if before is None else before.places
        known = [0 if row.sequence in drawing else row.sampling.generated_token_ids[-1] for row in rows]
        began = self._event()
        for row in rows:
            row.kv.length = row.position
        logits = self._decode(known if before is None else _behind(rows, known, before), [row.kv for row in rows])
        # Which token is drawn meanwhile changes nothing: these states only count it.
        states = [row.sampling.after((0,), None) if row.sequence in drawing else row.sampling for row in rows]
        return _Begun({row.sequence: place for place, row in enumerate(rows)}, Sampling(logits, states), began)


def _behind(rows: Sequence[Row], known: Sequence[int], before: _Begun) -> Tensor:
    """The last token of each row's sequence, int64 [R] on the device: what the step before draws, or else is known."""
    drawn, places = before.sampling.token_ids, before.places
    num_drawn = len(drawn)
    index = [places.get(row.sequence, num_drawn + place) for place, row in enumerate(rows)]
    if index == [*range(num_drawn)]:
        return drawn
    places_and_ids = upload_ids([*index, *known], drawn.device)
    return torch.cat([drawn, places_and_ids[len(index) :]])[places_and_ids[: len(index)]]
