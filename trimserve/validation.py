"""What pydantic refuses, in words: the rule that it has, and what was got.

One place for requests, configuration and files. It knows none of them.
"""

from collections.abc import Mapping
from typing import Final

__all__ = ["complaint"]

MAX_CHARS: Final = 80
"""Of a text that is shown."""

_SAYS_ALL: Final = frozenset({"missing", "json_invalid", "too_short", "too_long", "extra_forbidden"})
"""Kinds of errors whose value is what lies around the place, or adds nothing."""

_GOT: Final = ", got "


def complaint(error: Mapping[str, object], *, is_secret: bool = False) -> str:
    """What a value must be, and what it is.

    Args:
        error: one of `ValidationError.errors()`, with its input.
        is_secret: whether to tell of the value only that it is wrong.
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    if is_secret or error["type"] in _SAYS_ALL or _GOT in message:
        return message
    return f"{message}{_GOT}{_shown(error['input'])}"


def _shown(value: object) -> str:
    """A value as people who wrote JSON or TOML call it, in at most about `MAX_CHARS`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return f"an object of {len(value)}"
        case list() | tuple():
            return f"a list of {len(value)}"
        case str() if len(value) > MAX_CHARS:
            return f"{value[:MAX_CHARS]!r}..."
        case _:
            return repr(value)[:MAX_CHARS]
