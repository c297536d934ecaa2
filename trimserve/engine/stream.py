"""One submitted request between the event loop, the workers and the engine thread."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from trimserve.api.chunks import Finished, GenerationChunk, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.engine.lookahead import Ticket
from trimserve.engine.preparation import Preparation
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.errors import TrimserveError

__all__ = ["MOST_TOKENS", "Stream"]

MOST_TOKENS = 1024
"""Of one delta: with all logprobs that can be asked for still less than the 4 MiB that gRPC clients take by default."""


@dataclass(eq=False, slots=True)
class Stream:
    """One submitted request, from its first moment to its last chunk.

    Whatever has a job for it holds the stream alone; a stream that is closed lets go of everything else.
    """

    request_id: str
    priority: int
    submitted_at: float
    chunks: asyncio.Queue[GenerationChunk | TrimserveError] = field(default_factory=asyncio.Queue)
    is_open: bool = True
    """Changed by the event loop only, under the runner's lock."""
    preparation: Preparation | None = None
    """None once the engine has the sequence."""
    ticket: Ticket | None = None
    """Of a request with images, until the engine has taken them."""
    num_answers: int = 1
    """Those that have not ended."""
    adapter: str | None = None
    """That it has taken, until it is closed."""
    sequence: Sequence | None = None
    """None while the prompt is being prepared."""

    @classmethod
    def of(cls, request: GenerationRequest, submitted_at: float) -> "Stream":
        """A request's, before anything is done for it.

        The first pass of one that looks again ends without its stream: it stays open, as if an answer were missing,
        until the second pass has ended.
        """
        num_answers = request.num_choices + (request.trim.look_again is not None)
        return cls(request.request_id, request.priority, submitted_at, num_answers=num_answers)

    async def take(self) -> list[GenerationChunk | TrimserveError]:
        """Wait for what comes next; tokens that came while nobody listened come together, `MOST_TOKENS` at most."""
        waiting = [await self.chunks.get()]
        while not self.chunks.empty():
            waiting.append(self.chunks.get_nowait())
        taken: list[GenerationChunk | TrimserveError] = []
        deltas: dict[int, list[TokenDelta]] = {}  # by answer; only `Started` comes before them, only an end after
        for chunk in waiting:
            match chunk:
                case TokenDelta():
                    deltas.setdefault(chunk.choice, []).append(chunk)
                    continue
                case Finished():
                    taken += _joined(deltas.pop(chunk.choice, []))
                case TrimserveError():
                    taken += chain.from_iterable(map(_joined, deltas.values()))
                    deltas.clear()
            taken.append(chunk)
        return [*taken, *chain.from_iterable(map(_joined, deltas.values()))]

    @property
    def state(self) -> SequenceState:
        """Where the request is; one that is being prepared waits."""
        return SequenceState.WAITING if self.sequence is None else self.sequence.request_state

    @property
    def urgency(self) -> tuple[float, ...]:
        """Sorts the most urgent first, as the engine's queue does."""
        return (-self.priority, self.submitted_at)


def _joined(deltas: list[TokenDelta]) -> Iterator[TokenDelta]:
    for begin in range(0, len(deltas), MOST_TOKENS):
        yield TokenDelta.joined(deltas[begin : begin + MOST_TOKENS])
