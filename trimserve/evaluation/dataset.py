"""Questions about images, from a JSONL file: one object with image, question, answer and kind on each line.

Image paths are relative to the file. It knows nothing about models; images are checked to exist, not opened.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from trimserve.validation import complaint

__all__ = ["ALL_KINDS", "DatasetError", "Question", "describe_questions", "load_questions"]

ALL_KINDS = "all"
"""What rows over every question go by; no kind may be called so."""


class DatasetError(ValueError):
    """A data set that cannot be read; names the file and the line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image."""

    image: Path
    """An image file. Questions on one image should follow each other: it is encoded once for all of them."""
    text: str
    answer: str | None = None
    """What is right; None where only the model's distributions are compared."""
    kind: str = ""
    """What it asks for, to be reported apart; empty: nothing in particular."""
    source: str = ""
    """Where it stands, for errors, such as `questions.jsonl:17`."""


class _Line(BaseModel):
    image: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]
    answer: str | None = None
    kind: str = ""


def load_questions(path: Path, *, limit: int | None = None, need_answers: bool = True) -> list[Question]:
    """Read a data set.

    Args:
        path: JSONL file; blank lines and unknown fields are passed over.
        limit: read at most this many questions.
        need_answers: refuse questions without an answer.
    Returns:
        The questions in the file's order, at least one.
    Raises:
        DatasetError: no such file, no question, a line that is not as described, or a missing image.
    """
    try:
        # Not splitlines: what it takes for line ends, such as U+2028, may stand within JSON's strings.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if len(questions) == limit:
            break
        if line.strip():
            questions.append(_question(line, path.parent, f"{path.name}:{number}", need_answers))
    if not questions:
        raise DatasetError(f"{path}: must have at least 1 question, got none")
    return questions


def describe_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Say what was asked, so that a report can be compared with another.

    Returns:
        Numbers of questions, images and questions of each kind, and a hash over texts, answers and image files.
    """
    digest = hashlib.sha256()
    images: dict[Path, str] = {}
    for question in questions:
        if question.image not in images:
            images[question.image] = hashlib.sha256(question.image.read_bytes()).hexdigest()
        fields = (images[question.image], question.text, question.answer or "", question.kind)
        digest.update("\0".join(fields).encode() + b"\n")
    return {
        "num_questions": len(questions),
        "num_images": len(images),
        "kinds": dict(sorted(Counter(question.kind for question in questions if question.kind).items())),
        "sha256": digest.hexdigest(),
    }


def _question(line: str, folder: Path, source: str, need_answer: bool) -> Question:
    try:
        read = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DatasetError(f"{source}: {field + ': ' if field else ''}{complaint(first)}") from None
    if read.kind == ALL_KINDS:
        raise DatasetError(f"{source}: kind: must not be {ALL_KINDS!r}, which stands for all questions")
    if need_answer and read.answer is None:
        raise DatasetError(f"{source}: answer: Field required")
    image = folder / read.image
    if not image.is_file():
        raise DatasetError(f"{source}: image: no such file: {image}")
    return Question(image, read.question, read.answer, read.kind, source)
