"""Held-out questions to a model: who asks, what is right, and intervals over the images that they are about."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from training.heldout import write_held_out
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.metrics import Bootstrap, is_match

__all__ = ["bootstrap_of", "held_out", "is_right"]


@contextmanager
def held_out(num_questions: int, pictures: Sequence[str] = (), seed: int = 0) -> Iterator[list[Question]]:
    """Questions that training never saw, while the block runs; see `write_held_out`."""
    with TemporaryDirectory() as folder:
        yield load_questions(write_held_out(Path(folder), num_questions, seed, pictures))


def is_right(questions: Sequence[Question], answers: Sequence[Answer]) -> NDArray[np.float64]:
    """1 for each question that is answered rightly, else 0: [Q]."""
    pairs = zip(answers, questions, strict=True)
    return np.array([is_match(answer.text, question.answer or "") for answer, question in pairs], float)


def bootstrap_of(questions: Sequence[Question]) -> Bootstrap:
    """Intervals over the images that questions are about."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions))}
    return Bootstrap(np.array([numbers[question.image] for question in questions]))
