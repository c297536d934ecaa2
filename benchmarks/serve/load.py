"""Sends workloads and takes the time: as fast as some clients can, or as independent clients come.

A target is anything that can be asked; it stamps each message that brings tokens. All times are `time.monotonic()`,
which processes of one machine share.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.serve.workload import Item

__all__ = ["Answer", "Ask", "Exchange", "closed_loop", "open_loop"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    arrivals: tuple[float, ...] = ()
    """When each message with tokens came."""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """Empty where the target does not tell them."""
    num_padding: int = 0
    """Visual features of padding tiles."""
    num_valid: int = 0
    """Visual features of the images' own tiles."""
    num_kept: int = 0
    """Those of them that were kept."""
    num_merged: int = 0
    """Rows that the others were merged into."""
    cross_kv_bytes: int = 0
    """Cross-attention KV held, whole pages."""
    error: str | None = None
    """Why there is no answer."""


Ask = Callable[[Item], Awaitable[Answer]]
"""Sends one item; returns when all is said, also when it is an error."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One item and its answer."""

    item: Item
    sent: float
    finished: float
    answer: Answer

    @property
    def time_to_first_token(self) -> float:
        """Seconds."""
        return self.answer.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages with tokens."""
        return [later - earlier for earlier, later in pairwise(self.answer.arrivals)]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.finished - self.sent

    @property
    def time_per_output_token(self) -> float:
        """Mean seconds from one token to the next; needs two tokens."""
        return (self.answer.arrivals[-1] - self.answer.arrivals[0]) / (self.answer.num_tokens - 1)


async def closed_loop(ask: Ask, items: Iterable[Item], concurrency: int) -> list[Exchange]:
    """Let some clients share the items; each sends its next one when it has its answer.

    Args:
        ask: the target.
        items: in the order in which they are sent.
        concurrency: clients.
    Returns:
        Exchanges in the order of the items.
    """
    waiting = iter(items)

    async def client() -> list[Exchange]:
        return [await _exchange(ask, item, time.monotonic()) for item in waiting]

    groups = await asyncio.gather(*(client() for _ in range(concurrency)))
    return sorted((each for group in groups for each in group), key=lambda exchange: exchange.item.index)


async def open_loop(ask: Ask, items: Sequence[Item], arrivals: Sequence[float]) -> list[Exchange]:
    """Send each item at its time, whatever became of those before it.

    Waiting counts from the time an item was due, so a load generator that falls behind cannot hide it.

    Args:
        ask: the target.
        items: in order.
        arrivals: seconds from now, one for each item.
    Returns:
        Exchanges in the order of the items.
    """
    start = time.monotonic()

    async def client(item: Item, due: float) -> Exchange:
        await asyncio.sleep(due - time.monotonic())
        return await _exchange(ask, item, due)

    clients = (client(item, start + arrival) for item, arrival in zip(items, arrivals, strict=True))
    return list(await asyncio.gather(*clients))


async def _exchange(ask: Ask, item: Item, sent: float) -> Exchange:
    answer = await ask(item)
    return Exchange(item, sent, time.monotonic(), answer)
