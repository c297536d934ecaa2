"""What can cover a patch, as numbers: the labels of the auxiliary loss, whatever kind of picture they are of."""

from dataclasses import dataclass

from training.objects import CLASSES
from training.scenes import SHAPES, Scene

__all__ = ["BAR", "NUM_MARKS", "Box", "Mark", "object_mark", "scene_marks", "sign_mark"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the picture before any scaling."""

_SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

BAR = 1 + len(SHAPES) + len(_SIGNS) + len(CLASSES)
"""A bar or a line of a chart."""

NUM_MARKS = BAR + 1
"""Background, shapes, digits, letters, classes of objects, bars."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something at a place."""

    box: Box
    number: int
    """0 would be background; below `NUM_MARKS`."""
    colour: str | None = None
    """A key of `COLOURS`, where it is clear."""


def sign_mark(box: Box, sign: str, colour: str | None = None) -> Mark | None:
    """A digit or a capital; None for any other sign."""
    return Mark(box, 1 + len(SHAPES) + _SIGNS.index(sign), colour) if sign in _SIGNS else None


def object_mark(box: Box, name: str) -> Mark:
    """An object of a class."""
    return Mark(box, 1 + len(SHAPES) + len(_SIGNS) + CLASSES.index(name))


def scene_marks(scene: Scene) -> tuple[Mark, ...]:
    """Things and signs of a scene."""
    found: list[Mark | None] = []
    for thing in scene.things:
        half = thing.size / 2
        box = (thing.x - half, thing.y - half, thing.x + half, thing.y + half)
        found.append(Mark(box, 1 + SHAPES.index(thing.shape), thing.colour))
    writing = scene.writing
    if writing is not None:
        found += [sign_mark(box, sign, writing.colour) for box, sign in zip(writing.boxes, writing.text, strict=True)]
    return tuple(mark for mark in found if mark is not None)
