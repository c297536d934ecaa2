"""What lmms-eval cannot read off the task's YAML: how an image is opened, and what counts as right."""

from collections.abc import Mapping, Sequence

from PIL import Image

__all__ = ["images_of", "score"]


def images_of(question: Mapping[str, str]) -> list[Image.Image]:
    """The question's image, from the folder where lmms-eval was started."""
    with Image.open(question["image"]) as image:
        return [image.convert("RGB")]


def score(question: Mapping[str, str], answers: Sequence[str]) -> dict[str, float]:
    """1 for an answer that is the expected one but for case, white space and a full stop at the end; else 0."""
    given, expected = (" ".join(text.lower().split()).rstrip(".").rstrip() for text in (answers[0], question["answer"]))
    return {"exact_match": float(given == expected)}
