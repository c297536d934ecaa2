"""The sample images of the package, each with a question that the embedded model can answer."""

import json
from pathlib import Path

__all__ = ["samples"]

_FOLDER = Path(__file__).parent.parent / "assets/samples"


def samples() -> list[tuple[str, str]]:
    """Path of an image, and a question; in the order of the list that the package ships."""
    listed = json.loads((_FOLDER / "samples.json").read_text())
    return [(str(_FOLDER / each["file"]), each["question"]) for each in listed]
