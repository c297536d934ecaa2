"""What an image shows: coloured things at clear places, and at most one piece of writing.

A `Scene` is the truth that `render.py` draws and `questions.py` asks about. Nothing here touches a pixel.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import ImageFont
from sklearn.datasets import load_digits

from training.words import HELD_OUT_WORDS, TRAIN_WORDS

__all__ = [
    "ASPECT_RATIOS",
    "COLOURS",
    "NUM_HELD_OUT_DIGITS",
    "SHAPES",
    "TILE_SIZE",
    "Scene",
    "Split",
    "Thing",
    "Warp",
    "Writing",
    "digit_ids",
    "font",
    "sample_scene",
]

Split = Literal["train", "held_out"]

TILE_SIZE = 64
"""Pixels along the side of a tile."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (240, 225, 40),
    "green": (35, 165, 55),
    "blue": (35, 75, 225),
    "purple": (125, 40, 170),
    "pink": (250, 140, 195),
    "white": (250, 250, 250),
}
"""Names and mean RGB; the renderer varies them a little."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")

ASPECT_RATIOS: dict[tuple[int, int], float] = {
    (1, 1): 0.2,
    (1, 2): 0.17,
    (2, 1): 0.12,
    (2, 2): 0.16,
    (1, 3): 0.09,
    (3, 1): 0.07,
    (1, 4): 0.08,
    (4, 1): 0.06,
}
"""Tiles (high, wide) and how often an image has them: all that four tiles allow."""

NUM_HELD_OUT_DIGITS = 397
"""The last images of scikit-learn's digits, never trained on."""

_GAP = 8
"""Pixels between the centres of things along the image's long side: their order is never in doubt."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str
    x: int
    """Pixels from the left to the centre."""
    y: int
    """Pixels from the top to the centre."""
    size: int
    """Pixels along the side of the bounding square."""

    @property
    def name(self) -> str:
        """Such as `red star`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Warp:
    """How a digit is written differently from its image, about its middle."""

    degrees: float
    """Turned counter-clockwise."""
    shear: float
    """Pixels that the top moves to the right per pixel of half the height."""
    wide: float
    """Factor of the width."""
    high: float
    """Factor of the height."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A row of handwritten digits, or a printed word."""

    text: str
    colour: str
    left: int
    top: int
    height: int
    """Pixels: the side of a digit's square, or the font size of a word."""
    digit_images: tuple[int, ...] = ()
    """Indices into scikit-learn's digits, one for each digit; empty for a word."""
    warps: tuple[Warp, ...] = ()
    """One for each digit, or none at all."""

    @property
    def is_number(self) -> bool:
        """Whether it is digits and not a word."""
        return bool(self.digit_images)

    @property
    def name(self) -> str:
        """Such as `the number 471` or `the word TREE`."""
        return f"the {'number' if self.is_number else 'word'} {self.text}"

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, top, right and bottom of each character, in pixels."""
        if self.is_number:
            edges: list[float] = [self.left + i * self.height for i in range(len(self.text) + 1)]
        else:
            edges = [self.left + font(self.height).getlength(self.text[:i]) for i in range(len(self.text) + 1)]
        return [(a, self.top, b, self.top + self.height) for a, b in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class Scene:
    """An image in words."""

    width: int
    height: int
    things: tuple[Thing, ...]
    """Along the image's long side: left to right, or top to bottom where the image is taller than wide."""
    writing: Writing | None
    is_light: bool
    """Whether the background is light; nothing on it is white or yellow then."""
    texture_seed: int

    @property
    def is_tall(self) -> bool:
        """Whether things are ordered top to bottom."""
        return self.height > self.width


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow, the same on every machine.

    Args:
        size: pixels.
    """
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


@cache
def digit_ids(split: Split) -> dict[str, list[int]]:
    """Images of each digit, as indices into scikit-learn's digits.

    Returns:
        For `"0"` to `"9"` the images that the split may show.
    """
    targets = load_digits().target
    first_held_out = len(targets) - NUM_HELD_OUT_DIGITS
    allowed = (
        np.arange(len(targets)) < first_held_out if split == "train" else np.arange(len(targets)) >= first_held_out
    )
    return {str(digit): np.flatnonzero(allowed & (targets == digit)).tolist() for digit in range(10)}


def sample_scene(rng: random.Random, split: Split) -> Scene:
    """Draw a scene.

    Args:
        rng: the only source of chance.
        split: whose digits and words it may show.
    """
    high, wide = rng.choices(list(ASPECT_RATIOS), list(ASPECT_RATIOS.values()))[0]
    width, height = TILE_SIZE * wide, TILE_SIZE * high
    if rng.random() < 0.2:  # an image that does not fill its canvas, as most do not
        width -= rng.randrange(0, 25) if wide > 1 else 0
        height -= rng.randrange(0, 25) if high > 1 else 0
    is_light = rng.random() < 0.2
    colours = [name for name in COLOURS if not (is_light and name in ("white", "yellow"))]
    ink = rng.choice(
        ["red", "green", "blue", "purple"] if is_light else [c for c in colours if c not in ("blue", "purple")]
    )
    is_written_on = rng.random() < (0.75 if split == "train" else 0.5)  # reading is the slowest to learn
    writing = _sample_writing(rng, split, width, height, ink) if is_written_on else None
    things: tuple[Thing, ...] = ()
    if writing is None or (width * height > TILE_SIZE**2 and rng.random() < 0.5):
        things = _sample_things(rng, width, height, colours, writing, high * wide)
    return Scene(width, height, things, writing, is_light, rng.getrandbits(32))


def _sample_writing(rng: random.Random, split: Split, width: int, height: int, colour: str) -> Writing:
    is_number = rng.random() < 0.55
    size = rng.randint(14, 20) if is_number else rng.randint(16, 24)
    longest = min(6, (width - 4) // size) if is_number else 5
    text = _sample_number(rng, longest) if is_number else _sample_word(rng, split, width, size)
    length = size * len(text) if is_number else int(font(size).getlength(text)) + 1
    left, top = rng.randint(1, width - length - 1), rng.randint(1, height - int(size * 1.2) - 1)
    if not is_number:
        return Writing(text, colour, left, top, size)
    images = tuple(rng.choice(digit_ids(split)[digit]) for digit in text)
    # 1,400 digits are soon known by heart; other hands write them at other slants.
    warps = tuple(_sample_warp(rng) for _ in text) if split == "train" else ()
    return Writing(text, colour, left, top, size, images, warps)


def _sample_warp(rng: random.Random) -> Warp:
    return Warp(rng.uniform(-14, 14), rng.uniform(-0.2, 0.2), rng.uniform(0.82, 1.12), rng.uniform(0.82, 1.12))


def _sample_number(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(min(2, longest), longest)))


def _sample_word(rng: random.Random, split: Split, width: int, size: int) -> str:
    while True:
        if split == "held_out":
            word = rng.choice(HELD_OUT_WORDS)
        elif rng.random() < 0.5:
            word = rng.choice(TRAIN_WORDS)
        else:
            word = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 5)))
        if font(size).getlength(word) < width - 4 and (split == "held_out" or word not in HELD_OUT_WORDS):
            return word


def _sample_things(
    rng: random.Random, width: int, height: int, colours: list[str], writing: Writing | None, num_tiles: int
) -> tuple[Thing, ...]:
    fewest, most = {1: (2, 4), 2: (3, 5)}.get(num_tiles, (3, 6))
    wanted = rng.randint(fewest, most if writing is None else most - 1)
    some_colours = rng.sample(colours, min(len(colours), rng.randint(2, 5)))
    some_shapes = rng.sample(SHAPES, rng.randint(2, 5))
    things: list[Thing] = []
    for _ in range(200):
        if len(things) == wanted:
            break
        size = rng.randint(13, 26)
        half = size // 2 + 1
        x, y = rng.randint(half, width - half), rng.randint(half, height - half)
        thing = Thing(rng.choice(some_colours), rng.choice(some_shapes), x, y, size)
        if _fits(thing, things, writing, is_tall=height > width):
            things.append(thing)
    return tuple(sorted(things, key=lambda thing: thing.y if height > width else thing.x))


def _fits(thing: Thing, others: list[Thing], writing: Writing | None, is_tall: bool) -> bool:
    for other in others:
        apart = (thing.size + other.size) / 2 + 2
        if max(abs(thing.x - other.x), abs(thing.y - other.y)) < apart:
            return False
        if abs(thing.y - other.y if is_tall else thing.x - other.x) < _GAP:
            return False
    if writing is None:
        return True
    left, top, right, bottom = (
        writing.left,
        writing.top,
        writing.boxes[-1][2],
        writing.top + writing.height * 1.2,
    )
    reach = thing.size / 2 + 2
    return not (left - reach < thing.x < right + reach and top - reach < thing.y < bottom + reach)
