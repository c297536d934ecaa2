"""The target of an HTTP request: what both HTTP doors take for its path."""

import re
from typing import Final

__all__ = ["path_of"]

_AUTHORITY: Final = re.compile(r"\Ahttps?://[^/]*", re.IGNORECASE)
"""What comes before the path where a target is a whole address, as clients send who take a server for a proxy."""


def path_of(target: str) -> str:
    """The path that a request asks for, beginning with a slash.

    Args:
        target: of the request, without a query; as it was sent, or decoded.
    """
    path = _AUTHORITY.sub("", target)
    return path if path.startswith("/") else f"/{path}"
