"""Sends workloads, takes the time, and says what it came to.

As fast as some clients can (closed loop), or as independent clients come (open loop). A target is anything that can be
asked; it stamps each message that brings tokens. All times are `time.monotonic()`, which processes share.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from benchmarks.workload import KINDS, Item

__all__ = [
    "Answer",
    "Ask",
    "Exchange",
    "agreement",
    "closed_loop",
    "median_round",
    "open_loop",
    "percentiles",
    "ratios",
    "summary",
]

_DIGITS = 5
"""Of seconds: 10 microseconds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    arrivals: tuple[float, ...] = ()
    """When each message with tokens came."""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """Empty where the target does not tell them."""
    num_valid: int = 0
    """Visual features of the images' own tiles."""
    num_kept: int = 0
    """Rows held for them: those that were kept, and those that others were merged into."""
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


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """p50, p90 and p99 with linear interpolation between samples; None without any."""
    values = list(samples)
    if not values:
        return None
    found = np.percentile(values, (50, 90, 99))
    return {name: round(float(value), _DIGITS) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}


def summary(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Rates and latencies of a load.

    Rates count what was answered, from the first request's begin to the last answer's end. A time to first token
    includes all waiting.
    """
    answered = [each for each in exchanges if each.answer.error is None]
    seconds = max(each.finished for each in exchanges) - min(each.sent for each in exchanges)
    num_tokens = sum(each.answer.num_tokens for each in answered)
    valid, kept = (sum(getattr(each.answer, name) for each in answered) for name in ("num_valid", "num_kept"))
    return {
        "num_requests": len(exchanges),
        "errors": sorted({each.answer.error for each in exchanges if each.answer.error}),
        "num_failed": len(exchanges) - len(answered),
        "seconds": round(seconds, 3),
        "num_prompt_tokens": sum(each.answer.num_prompt_tokens for each in answered),
        "num_tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 2),
        "requests_per_second": round(len(answered) / seconds, 4),
        "time_to_first_token_seconds": percentiles(each.time_to_first_token for each in answered),
        "inter_token_seconds": percentiles(gap for each in answered for gap in each.gaps),
        "time_per_output_token_seconds": percentiles(each.time_per_output_token for each in answered),
        "duration_seconds": percentiles(each.finished - each.sent for each in answered),
        "time_to_first_token_seconds_by_kind": _first_tokens(answered),
        "kept_fraction": round(kept / valid, 4) if valid else None,
    }


def _first_tokens(answered: Sequence[Exchange]) -> dict[str, dict[str, float] | None]:
    """By kind of image, and whether it was new."""
    groups: dict[str, list[float]] = {
        kind if kind == "text" else f"{kind}, {name}": []
        for kind in KINDS
        for name in ("first_image", "repeated_image")
    }
    for each in answered:
        name = "repeated_image" if each.item.is_repeated else "first_image"
        kind = each.item.kind
        groups[kind if kind == "text" else f"{kind}, {name}"].append(each.time_to_first_token)
    return {name: percentiles(seconds) for name, seconds in groups.items()}


def median_round(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary that stands for several of the same load.

    Returns:
        The last one if that has errors, else the median by rate, of an even number the slower one in the middle; and
        the rates of all.
    """
    ordered = sorted(rounds, key=lambda each: each["tokens_per_second"])
    chosen = rounds[-1] if rounds[-1]["errors"] else ordered[(len(ordered) - 1) // 2]
    return {**chosen, "tokens_per_second_of_rounds": [each["tokens_per_second"] for each in ordered]}


def agreement(ours: Sequence[Exchange], theirs: Sequence[Exchange]) -> dict[str, Any]:
    """How many answers to the same items are the same to the last token.

    Args:
        ours: answers that tell token ids.
        theirs: the same, of another target.
    """
    pairs = [(a.answer, b.answer) for a, b in zip(ours, theirs, strict=True)]
    compared = [(a.token_ids, b.token_ids) for a, b in pairs if a.error is None and b.error is None]
    common = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))) for a, b in compared]
    return {
        "num_compared": len(compared),
        "num_equal_prompts": sum(a.num_prompt_tokens == b.num_prompt_tokens for a, b in pairs),
        "num_equal_answers": sum(a == b for a, b in compared),
        "num_tokens": sum(len(a) for a, _ in compared),
        "num_tokens_before_they_part": sum(common),
    }


def ratios(loads: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of each of our closed loops over each rival's; rivals that failed a request are left out.

    Args:
        loads: summaries by target; ours begin with `trimserve`, the others' with `transformers`.
    """
    rates = {name: load["tokens_per_second"] for name, load in loads.items() if not load["errors"]}
    return {
        f"{ours}_over_{rival}": round(rates[ours] / rate, 3)
        for ours in ("trimserve", "trimserve_untrimmed")
        if ours in rates
        for rival, rate in rates.items()
        if rival.startswith("transformers")
    }
