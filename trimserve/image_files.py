"""Image files that a user names, and which of them the server means when it refuses a request."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from trimserve.errors import InvalidRequest
from trimserve.refusal import Refusal
from trimserve.v1 import generation_pb2 as pb

__all__ = ["STANDARD_INPUT", "image_fields", "name_of", "named_files", "read_image"]

STANDARD_INPUT = "-"
"""What stands for it, as a file."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def read_image(name: str, folder: Path | None = None) -> bytes:
    """Content of an image file.

    Args:
        name: its path, or `-` for standard input.
        folder: that a relative path begins at; None is the working directory, and allows standard input.
    Raises:
        InvalidRequest: it cannot be read; names the file.
    """
    if _URL.match(name):
        raise InvalidRequest(name[:80], "is a URL, and images are read from files: download it first")
    try:
        if name == STANDARD_INPUT and folder is None:
            return sys.stdin.buffer.read()
        return (folder or Path()).joinpath(Path(name).expanduser()).read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~ of nobody
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest(name or "image", why or repr(error)) from None


def image_fields(request: pb.GenerateRequest) -> Iterator[str]:
    """Paths of a request's images, in order, as the server's errors name them.

    Args:
        request: any.
    """
    for i, message in enumerate(request.chat.messages):
        for j, part in enumerate(message.parts):
            if part.HasField("image"):
                yield f"chat.messages[{i}].parts[{j}].image"
    for i in range(len(request.images)):
        yield f"images[{i}]"


def name_of(field: str, files: Mapping[str, str]) -> str | None:
    """The file that a field's content came from; None if it came from none.

    Args:
        field: path of the field, or of one below it.
        files: by the path of the image, as `image_fields` tells it.
    """
    named = (file for path, file in files.items() if field == path or field.startswith(f"{path}."))
    return next(named, None)


@contextmanager
def named_files(request: pb.GenerateRequest, names: Sequence[str]) -> Iterator[None]:
    """Within the block, let the server's refusal of an image name the file that it came from.

    Args:
        request: that is sent.
        names: of the files of its images, in order.
    Raises:
        InvalidRequest: in place of the `grpc.RpcError` of an image.
    """
    try:
        yield
    except grpc.RpcError as error:
        refusal = Refusal.of(error)
        file = name_of(refusal.field, dict(zip(image_fields(request), _shown(names), strict=True)))
        if file is None:
            raise
        raise InvalidRequest(file, refusal.description) from None


def _shown(names: Iterable[str]) -> Iterator[str]:
    return ("standard input" if name == STANDARD_INPUT else name for name in names)
