"""Load: questions about images and of text alone, the same for equal seeds, sent to a target, and what it came to.

As fast as some clients can (closed loop), or as independent clients come (open loop). A target is anything that can be
asked; it stamps each message that brings tokens. All times are `time.monotonic()`, which processes share.
"""

import io
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, Literal

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "Answer",
    "Ask",
    "Exchange",
    "Item",
    "Kind",
    "closed_loop",
    "draw_picture",
    "make_workload",
    "num_equal_answers",
    "open_loop",
    "percentiles",
    "picture_of",
    "poisson_arrivals",
    "summary",
]

Kind = Literal["four_tiles", "one_tile", "text"]
"""Tiles of an item's image, or none."""

_SHARES: Final[dict[Kind, float]] = {"four_tiles": 0.5, "one_tile": 0.25}
"""Of the items; the others are text."""
_SENTENCES: Final = (
    "What is in the image?",
    "Describe what you see in a few words.",
    "Which colour is the largest thing?",
    "How many shapes are there, and where are they?",
    "Is there something to the left of the blue circle?",
    "Answer in one sentence and name every colour.",
    "If you cannot tell, say so.",
    "Begin with the thing that is closest to the middle.",
)


@dataclass(frozen=True, slots=True)
class Item:
    """One request."""

    index: int
    kind: Kind
    question: str
    images: tuple[bytes, ...]
    """JPEG files."""


def make_workload(num_requests: int, tile_size: int, seed: int = 0) -> tuple[Item, ...]:
    """The items in the order in which they are sent; every second one of a kind shows an image that was shown before.

    Args:
        num_requests: how many.
        tile_size: pixels along the side of the model's tiles.
        seed: other seeds give other questions, images and orders.
    """
    rng = random.Random(seed)
    kinds: list[Kind] = [kind for kind, share in _SHARES.items() for _ in range(round(share * num_requests))]
    kinds += ["text"] * (num_requests - len(kinds))
    rng.shuffle(kinds)
    shown: dict[Kind, list[bytes]] = {kind: [] for kind in _SHARES}
    items = []
    for index, kind in enumerate(kinds):
        images: tuple[bytes, ...] = ()
        if kind != "text":
            is_repeated = kinds[:index].count(kind) % 2 == 1
            images = (rng.choice(shown[kind]) if is_repeated else picture_of(kind, rng, tile_size),)
            shown[kind] += images
        items.append(Item(index, kind, " ".join(rng.choices(_SENTENCES, k=rng.randint(1, 8))), images))
    return tuple(items)


def picture_of(kind: Kind, rng: random.Random, tile_size: int) -> bytes:
    """An image that fills its tiles; `kind` has some."""
    return draw_picture(rng, tile_size * (2 if kind == "four_tiles" else 1))


def draw_picture(rng: random.Random, side: int) -> bytes:
    """A JPEG of coloured ellipses on an uneven ground.

    Args:
        rng: decides what is on it.
        side: pixels along each side.
    """
    ground = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, radius = rng.randrange(side), rng.randrange(side), max(1, rng.randrange(side // 16, side // 5))
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def poisson_arrivals(num_requests: int, requests_per_second: float, seed: int = 0) -> list[float]:
    """Seconds at which independent clients come, ascending, at so many a second on average."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(requests_per_second) for _ in range(num_requests)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    arrivals: tuple[float, ...] = ()
    """When each message with tokens came."""
    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """Empty where the target does not tell them."""
    error: str | None = None
    """Why there is no answer."""


Ask = Callable[[Item], Answer]
"""Sends one item, in any thread; returns when all is said, also when it is an error."""


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


def closed_loop(ask: Ask, items: Iterable[Item], concurrency: int) -> list[Exchange]:
    """Let some clients share the items; each sends its next one when it has its answer."""
    with ThreadPoolExecutor(concurrency) as clients:
        return list(clients.map(lambda item: _exchange(ask, item, time.monotonic()), items))


def open_loop(ask: Ask, items: Sequence[Item], arrivals: Sequence[float]) -> list[Exchange]:
    """Send each item at its time, in seconds from now, whatever became of those before it.

    Waiting counts from the time an item was due, so a load generator that falls behind cannot hide it.
    """
    start = time.monotonic()

    def client(expected: tuple[Item, float]) -> Exchange:
        item, arrival = expected
        due = start + arrival
        time.sleep(max(0.0, due - time.monotonic()))  # requests come by the clock
        return _exchange(ask, item, due)

    with ThreadPoolExecutor(len(items)) as clients:
        return list(clients.map(client, zip(items, arrivals, strict=True)))


def _exchange(ask: Ask, item: Item, sent: float) -> Exchange:
    answer = ask(item)
    return Exchange(item, sent, time.monotonic(), answer)


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """p50, p90 and p99 with linear interpolation between samples; None without any."""
    values = list(samples)
    if not values:
        return None
    found = np.percentile(values, (50, 90, 99))
    return {name: round(float(value), 5) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}


def summary(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Rates and latencies of a load.

    Rates count what was answered, from the first request's begin to the last answer's end. A time to first token
    includes all waiting.
    """
    answered = [each for each in exchanges if each.answer.error is None]
    seconds = max(each.finished for each in exchanges) - min(each.sent for each in exchanges)
    num_tokens = sum(each.answer.num_tokens for each in answered)
    return {
        "num_requests": len(exchanges),
        "errors": sorted({each.answer.error for each in exchanges if each.answer.error}),
        "num_failed": len(exchanges) - len(answered),
        "seconds": round(seconds, 3),
        "num_tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 2),
        "requests_per_second": round(len(answered) / seconds, 4),
        "time_to_first_token_seconds": percentiles(each.time_to_first_token for each in answered),
        "inter_token_seconds": percentiles(gap for each in answered for gap in each.gaps),
        "duration_seconds": percentiles(each.finished - each.sent for each in answered),
    }


def num_equal_answers(ours: Sequence[Exchange], theirs: Sequence[Exchange]) -> int:
    """How many answers to the same items are the same to the last token; both targets tell token ids."""
    pairs = ((one.answer, other.answer) for one, other in zip(ours, theirs, strict=True))
    return sum(one.error is None and one.token_ids == other.token_ids for one, other in pairs)
