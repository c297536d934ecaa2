"""Held-out questions, as long as they are asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from training.heldout import write_held_out
from trimserve.evaluation.dataset import Question, load_questions

__all__ = ["held_out"]


@contextmanager
def held_out(num_questions: int, pictures: Sequence[str] = ()) -> Iterator[list[Question]]:
    """Questions that training never saw, while the block runs; see `write_held_out`."""
    with TemporaryDirectory() as folder:
        yield load_questions(write_held_out(Path(folder), num_questions, pictures=pictures))
