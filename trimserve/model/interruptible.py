"""Work that can be interrupted: a generator that yields where it may pause and returns its result."""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

__all__ = ["Interruptible", "run_through"]

T = TypeVar("T")

Interruptible: TypeAlias = Generator[None, None, T]


def run_through(work: Interruptible[T]) -> T:
    """Do the work without a pause."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
