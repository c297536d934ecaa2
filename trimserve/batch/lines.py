"""Lines of the input: each a request as JSON, whose images are named by path.

A line is a `GenerateRequest` in protobuf's JSON, with three liberties: `id` names it; an image may be a path, as text
or as {"path": ...}; and `prompt`, with `system` and `images`, is short for a conversation of one question.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from google.protobuf import json_format

from trimserve.client import make_request
from trimserve.errors import InvalidRequest
from trimserve.image_files import image_fields, read_image
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Line", "Question", "id_of", "parse", "read_lines"]

_SHORT = ("prompt", "system", "images")
Json = dict[str, Any]
Message = TypeVar("Message", pb.GenerateRequest, pb.Image)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input that is not blank."""

    index: int
    """Number of the line in the file, from 0, blank ones counted."""
    content: bytes

    @property
    def digest(self) -> str:
        """Tells the line from others."""
        return hashlib.sha256(self.content).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Question:
    """What a line asks."""

    request: pb.GenerateRequest
    files: Mapping[str, str]
    """Names of its image files, by the paths of its images (`image_fields`)."""


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that are not blank.

    Args:
        file: read from its beginning.
    """
    file.seek(0)
    for index, line in enumerate(file):
        if content := line.strip():
            yield Line(index, content)


def id_of(line: Line) -> Any:
    """The line's `id`, of any type; None if it has none, or is not JSON.

    Args:
        line: any.
    """
    try:
        return _document(line).get("id")
    except InvalidRequest:
        return None


def parse(line: Line, folder: Path) -> Question:
    """The request of a line, with its images.

    Args:
        line: any.
        folder: that paths of images begin at.
    Raises:
        InvalidRequest: it is none, or an image cannot be read.
    """
    document = _document(line)
    document.pop("id", None)
    try:
        is_short = "prompt" in document
        request, names = _from_prompt(document, folder) if is_short else _from_message(document, folder)
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "line", f"must be text, got half of a surrogate pair, {error.object[error.start]!r}"
        ) from None
    fields = image_fields(request)
    return Question(request, {field: name for field, name in zip(fields, names, strict=True) if name is not None})


def _document(line: Line) -> Json:
    try:
        document = json.loads(line.content, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", f"must be a JSON object: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("line", f"must be a JSON object, got {type(document).__name__}")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # and as an `id` it would break a line of the output


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:64]} is too large")
    return value


def _from_prompt(document: Json, folder: Path) -> tuple[pb.GenerateRequest, list[str | None]]:
    short = {name: document.pop(name) for name in _SHORT if name in document}
    for name in ("prompt", "system"):
        if name in short and not isinstance(short[name], str):
            raise InvalidRequest(name, f"must be text, got {type(short[name]).__name__}")
    request = _message(document)
    if (kind := request.WhichOneof("prompt")) is not None:
        raise InvalidRequest("prompt", f"must not be beside {kind}")
    images = short.get("images", [])
    if not isinstance(images, list):
        raise InvalidRequest("images", f"must be a list, got {type(images).__name__}")
    loaded = [_image(image, folder) for image in images]
    asked = make_request(short["prompt"], [image.data for image, _ in loaded], system=short.get("system"))
    request.chat.CopyFrom(asked.chat)
    return request, [name for _, name in loaded]


def _from_message(document: Json, folder: Path) -> tuple[pb.GenerateRequest, list[str | None]]:
    """Images are taken out of the JSON, read, and put into the message: base64 would only be undone again."""
    places = [*_image_places(document)]
    loaded = [_image(place[key], folder) for place, key in places]
    for place, key in places:
        place[key] = {}
    request = _message(document)
    targets = [part.image for message in request.chat.messages for part in message.parts if part.HasField("image")]
    for target, (image, _) in zip([*targets, *request.images], loaded, strict=True):
        target.CopyFrom(image)
    return request, [name for _, name in loaded]


def _image_places(document: Json) -> Iterator[tuple[Any, Any]]:
    """Where the JSON has images, in the order of `image_fields`; what has another shape is left to protobuf."""
    for message in _list(document.get("chat"), "messages"):
        for part in _list(message, "parts"):
            if isinstance(part, dict) and part.get("image") is not None:
                yield part, "image"
    images = _list(document, "images")
    yield from ((images, i) for i in range(len(images)) if images[i] is not None)


def _list(parent: Any, name: str) -> list[Any]:
    value = parent.get(name) if isinstance(parent, dict) else None
    return value if isinstance(value, list) else []


def _image(image: Any, folder: Path) -> tuple[pb.Image, str | None]:
    """An image, and the name of its file if it has one."""
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str):
        return pb.Image(data=read_image(path, folder)), path
    if not isinstance(image, dict) or path is not None:
        raise InvalidRequest(
            "image", f'must be a path, or an object with "path" or "data", got {json.dumps(image)[:80]}'
        )
    return _parsed(image, pb.Image()), None


def _message(document: Json) -> pb.GenerateRequest:
    return _parsed(document, pb.GenerateRequest())


def _parsed(document: Json, message: Message) -> Message:
    try:
        json_format.ParseDict(document, message)
    except (json_format.ParseError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        raise InvalidRequest("line", why) from None
    return message
