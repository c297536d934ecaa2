"""What a client may send as a prompt: chat messages, a raw prompt, or token ids; images travel as bytes.

Plain frozen data, made by `server/grpc/convert.py`, read by `processor.py`.
"""

from dataclasses import dataclass

__all__ = ["ChatPrompt", "Image", "Message", "Part", "Prompt", "RawPrompt", "Text", "TokenPrompt"]


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a message. It is text only: special tokens typed into it have no power."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image file (PNG, JPEG, WebP, ...), sniffed by content."""

    data: bytes
    mime_type: str = ""


Part = Text | Image


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
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as the model reads them; one image token for each image, in order. Nothing is added."""

    token_ids: tuple[int, ...]
    images: tuple[Image, ...] = ()


Prompt = ChatPrompt | RawPrompt | TokenPrompt
