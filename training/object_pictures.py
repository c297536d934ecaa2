"""Pictures of objects on busy backgrounds, and questions about them: "What animal is on the left?"."""

import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from training.marks import Mark, object_mark
from training.objects import ANIMALS, CLASSES, Sticker, draw_sticker, sample_sticker
from training.photographs import Backdrop, draw_backdrop, sample_backdrop
from training.questions import Turn
from training.scenes import TILE_SIZE, Split

__all__ = ["ObjectPicture", "ask_object_questions", "sample_object_picture"]

_KIND = "object"
_LAYOUTS = {(1, 1): 0.3, (1, 2): 0.25, (2, 1): 0.15, (1, 3): 0.15, (2, 2): 0.15}
"""Places (high, wide), each a tile with at most one object, and how often."""


@dataclass(frozen=True, slots=True)
class ObjectPicture:
    """Objects, at most one in a tile, on a background."""

    high: int
    """Tiles."""
    wide: int
    stickers: tuple[Sticker, ...]
    """From left to right, then from top to bottom."""
    backdrop: Backdrop

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.wide * TILE_SIZE, self.high * TILE_SIZE

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What covers the picture."""
        return tuple(object_mark(sticker.box, sticker.name) for sticker in self.stickers)

    def draw(self) -> Image.Image:
        """The picture in RGB."""
        image = draw_backdrop(self.backdrop, *self.size)
        for sticker in self.stickers:
            draw_sticker(image, sticker)
        return image


def sample_object_picture(rng: random.Random, split: Split) -> ObjectPicture:
    """Draw a picture's content.

    Args:
        rng: the only source of chance.
        split: whose objects and photographs it may show.
    """
    high, wide = rng.choices(list(_LAYOUTS), list(_LAYOUTS.values()))[0]
    tiles = [(row, column) for row in range(high) for column in range(wide)]
    fewest = 1 if len(tiles) == 1 else 2
    taken = sorted(rng.sample(tiles, rng.randint(fewest, len(tiles))))
    stickers = []
    for row, column in taken:
        size = rng.randint(34, 58)
        slack = (TILE_SIZE - size) // 2
        x = column * TILE_SIZE + TILE_SIZE // 2 + rng.randint(-slack, slack)
        y = row * TILE_SIZE + TILE_SIZE // 2 + rng.randint(-slack, slack)
        stickers.append(sample_sticker(rng, split, rng.choice(CLASSES), x, y, size))
    return ObjectPicture(high, wide, tuple(stickers), sample_backdrop(rng, split))


def ask_object_questions(rng: random.Random, picture: ObjectPicture, count: int) -> list[Turn]:
    """Ask different questions.

    Args:
        rng: the only source of chance.
        picture: what is shown.
        count: how many to ask at most.
    """
    asked = [*_what(rng, picture), *_which_animal(picture), *_where(rng, picture)]
    rng.shuffle(asked)
    asked = asked[: max(1, count - 2)] + _yes_no_and_count(rng, picture)
    return [Turn(question, answer, _KIND) for question, answer in asked[:count]]


def _what(rng: random.Random, picture: ObjectPicture) -> list[tuple[str, str]]:
    stickers = picture.stickers
    if len(stickers) == 1:
        return [("What is shown?", stickers[0].name), ("Which object is shown?", stickers[0].name)]
    found = []
    across = sorted(stickers, key=lambda sticker: sticker.x)
    down = sorted(stickers, key=lambda sticker: sticker.y)
    if _apart(across, "x"):
        found += [("What is on the left?", across[0].name), ("What is on the right?", across[-1].name)]
    if _apart(down, "y"):
        found += [("What is at the top?", down[0].name), ("What is at the bottom?", down[-1].name)]
    if len(stickers) == 3 and picture.high == 1:
        found.append(("What is in the middle?", across[1].name))
    if picture.high == picture.wide == 2:
        found += [(f"What is at the {place}?", sticker.name) for sticker, place in _corners(picture)]
    return rng.sample(found, len(found))


def _apart(ordered: list[Sticker], axis: str) -> bool:
    """Whether both ends are beyond doubt: no other object is as far out."""
    places: list[int] = [getattr(sticker, axis) // TILE_SIZE for sticker in ordered]
    return places[0] < places[1] and places[-2] < places[-1]


def _which_animal(picture: ObjectPicture) -> list[tuple[str, str]]:
    animals = [sticker.name for sticker in picture.stickers if sticker.name in ANIMALS]
    return [("What animal is shown?", animals[0])] if len(animals) == 1 else []


def _where(rng: random.Random, picture: ObjectPicture) -> list[tuple[str, str]]:
    counts = Counter(sticker.name for sticker in picture.stickers)
    if picture.high == picture.wide == 2:
        named = [(sticker.name, place) for sticker, place in _corners(picture)]
    elif len(picture.stickers) == 2 and picture.wide == 2:
        named = [(s.name, place) for s, place in zip(picture.stickers, ("left", "right"), strict=True)]
    elif len(picture.stickers) == 2 and picture.high == 2:
        named = [(s.name, place) for s, place in zip(picture.stickers, ("top", "bottom"), strict=True)]
    else:
        return []
    clear = [(name, place) for name, place in named if counts[name] == 1]
    return [(f"Where is the {name}?", place) for name, place in rng.sample(clear, min(1, len(clear)))]


def _corners(picture: ObjectPicture) -> list[tuple[Sticker, str]]:
    found = []
    for sticker in picture.stickers:
        row = "top" if sticker.y < TILE_SIZE else "bottom"
        found.append((sticker, f"{row} {'left' if sticker.x < TILE_SIZE else 'right'}"))
    return found


def _yes_no_and_count(rng: random.Random, picture: ObjectPicture) -> list[tuple[str, str]]:
    names = {sticker.name for sticker in picture.stickers}
    wanted = rng.random() < 0.5
    name = rng.choice(sorted(names) if wanted else [name for name in CLASSES if name not in names])
    article = "an" if name[0] in "aeiou" else "a"
    count = ("How many objects are there?", str(len(picture.stickers)))
    return [(f"Is there {article} {name}?", "yes" if wanted else "no"), *([count] if rng.random() < 0.3 else [])]
