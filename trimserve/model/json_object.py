"""Reads the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from trimserve.errors import CheckpointError

__all__ = ["read_json"]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, got {type(content).__name__}")
    return content
