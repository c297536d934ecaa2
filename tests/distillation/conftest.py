"""The random checkpoint and questions of `tests/evaluation`, and what that model says of them."""

import pytest

from tests.evaluation.conftest import checkpoint, data, model, questions
from trimserve.distillation.lessons import Lessons
from trimserve.distillation.teacher import origin_of, write_lessons
from trimserve.evaluation.dataset import Question
from trimserve.model.mllama import Mllama

__all__ = ["checkpoint", "data", "lessons", "model", "questions"]


@pytest.fixture(scope="session")
def lessons(model: Mllama, questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    """Of all questions."""
    folder = tmp_path_factory.mktemp("lessons")
    origin = origin_of(model, "inputs", questions)
    write_lessons(folder, model, questions, origin, lambda: None)
    return Lessons(folder, origin)
