"""What a client may send as a prompt: chat messages, a raw prompt, or token ids; images travel as files.

Made by a transport, such as `server/grpc/convert.py`; read by `model/processor.py`.
"""

import dataclasses
from dataclasses import dataclass

__all__ = [
    "ChatPrompt",
    "CloserPrompt",
    "ImageFile",
    "Message",
    "Part",
    "PlainPrompt",
    "Prompt",
    "RawPrompt",
    "Region",
    "Text",
    "TokenPrompt",
]


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a message. Special tokens typed into it have no power."""

    text: str


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of an upright image, in shares of its height and width, inside [0, 1]."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An encoded image (PNG, JPEG, WebP, ...); the format is recognised by content."""

    data: bytes
    field: str = dataclasses.field(default="image", compare=False)
    """Path of the request's field that holds it, such as `images[0]`; errors name it."""
    region: Region | None = None
    """The part of it that is shown; None is all of it."""


Part = Text | ImageFile


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, rendered with the checkpoint's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """Text that may contain special tokens; one `<|image|>` for each image, in order."""

    text: str
    images: tuple[ImageFile, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are; one image token for each image, in order."""

    token_ids: tuple[int, ...]
    images: tuple[ImageFile, ...] = ()


PlainPrompt = ChatPrompt | RawPrompt | TokenPrompt
"""What a client sends."""


@dataclass(frozen=True, slots=True)
class CloserPrompt:
    """A prompt with one image, and a region of that image as a second one right behind it."""

    prompt: PlainPrompt
    region: Region


Prompt = PlainPrompt | CloserPrompt
