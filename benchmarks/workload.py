"""What clients ask: a mix of questions about images and of text alone, the same for equal settings.

It knows nothing of servers and clocks.
"""

import io
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["KINDS", "Item", "Kind", "draw_picture", "make_workload", "picture_of", "poisson_arrivals"]

Kind = Literal["four_tiles", "one_tile", "text"]
"""Tiles of the item's image, or none."""

KINDS: Final[tuple[Kind, ...]] = ("four_tiles", "one_tile", "text")

_SHARES: Final[dict[Kind, float]] = {"four_tiles": 0.5, "one_tile": 0.25}
"""Of the requests; the others are text."""
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
_MAX_SENTENCES: Final = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One request."""

    index: int
    kind: Kind
    question: str
    images: tuple[bytes, ...]
    """JPEG files."""
    is_repeated: bool = False
    """Whether an earlier item shows the same images."""


def make_workload(num_requests: int, tile_size: int, *, repeated_share: float = 0.5, seed: int = 0) -> tuple[Item, ...]:
    """The items in the order in which they are sent.

    Args:
        num_requests: how many.
        tile_size: pixels along the side of the model's tiles.
        repeated_share: of the requests with an image, those that show one which an earlier request showed, rounded
            down by kind.
        seed: other seeds give other questions, images and orders.
    """
    rng = random.Random(seed)
    counts = {kind: round(share * num_requests) for kind, share in _SHARES.items()}
    kinds: list[Kind] = [kind for kind, count in counts.items() for _ in range(count)][:num_requests]
    kinds += ["text"] * (num_requests - len(kinds))
    rng.shuffle(kinds)
    repeats = {kind: _repeats(kinds.count(kind), repeated_share, rng) for kind in KINDS}
    shown: dict[Kind, list[bytes]] = {kind: [] for kind in KINDS}
    seen: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    items = []
    for index, kind in enumerate(kinds):
        is_repeated = kind != "text" and seen[kind] in repeats[kind]
        seen[kind] += 1
        images: tuple[bytes, ...] = ()
        if is_repeated:
            images = (rng.choice(shown[kind]),)
        elif kind != "text":
            images = (picture_of(kind, rng, tile_size),)
            shown[kind] += images
        question = " ".join(rng.choices(_SENTENCES, k=rng.randint(1, _MAX_SENTENCES)))
        items.append(Item(index, kind, question, images, is_repeated))
    return tuple(items)


def _repeats(count: int, share: float, rng: random.Random) -> set[int]:
    """Which occurrences of a kind repeat an image; the first never does."""
    return set(rng.sample(range(1, count), min(int(share * count), count - 1))) if count > 1 else set()


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
    """Seconds at which independent clients come, ascending.

    Args:
        num_requests: how many.
        requests_per_second: on average, above 0.
        seed: of the gaps.
    """
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(requests_per_second) for _ in range(num_requests)))
