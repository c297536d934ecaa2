"""What benchmarks about harder pictures share: the model, what is right, and intervals over images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.metrics import Bootstrap, is_match
from trimserve.model.loading import load_model

__all__ = ["bootstrap_of", "interval", "is_right", "load"]


def load(model: str | None) -> InProcess:
    """A model in float32.

    Args:
        model: folder; None is the embedded model.
    """
    return InProcess(load_model(ModelConfig(model=model, dtype="float32"), EngineConfig()))


def is_right(questions: Sequence[Question], answers: Sequence[Answer]) -> NDArray[np.float64]:
    """1 for each question that is answered rightly, else 0: [Q]."""
    pairs = zip(answers, questions, strict=True)
    return np.array([is_match(answer.text, question.answer or "") for answer, question in pairs], float)


def bootstrap_of(questions: Sequence[Question]) -> Bootstrap:
    """Intervals over the images that questions are about."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions))}
    return Bootstrap(np.array([numbers[question.image] for question in questions]))


def interval(estimate: dict[str, float]) -> str:
    """A change in points with its 95 % interval, as people read it."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
