"""The sample images of the package, each with a question that the embedded model can answer."""

import json
from pathlib import Path

__all__ = ["samples"]

_FOLDER = Path(__file__).parent.parent / "assets/samples"


def samples() -> list[tuple[str, str]]:
    """Path of each image, and the first question that is listed for it."""
    listed = json.loads((_FOLDER / "samples.json").read_text())
    questions = {each["file"]: each["question"] for each in reversed(listed)}
    return [(str(_FOLDER / file), question) for file, question in sorted(questions.items())]
