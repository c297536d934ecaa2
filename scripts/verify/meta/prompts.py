"""One prompt said twice, as trimserve takes it and as Meta's chat format does."""

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem, StopReason
from PIL import Image

from trimserve.api.prompt import ChatPrompt, ImageFile, Message, RawPrompt, Text

__all__ = ["Part", "Turn", "file_of", "meta_chat", "meta_raw", "noise", "our_chat", "our_raw"]

IMAGE = "<|image|>"
BEGIN = "<|begin_of_text|>"

Part = str | bytes
"""Text, or an image file."""
Turn = tuple[str, Sequence[Part]]
"""A role and what it says."""


def noise(width: int, height: int, seed: int) -> Image.Image:
    """An image of that many pixels, another for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image: Image.Image, kind: str = "BMP", **options: Any) -> bytes:
    """The image as a file; BMP is the fastest without loss."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def our_raw(text: str, images: Sequence[bytes] = (), begin: str = BEGIN) -> RawPrompt:
    """A raw prompt of a text with `<|image|>` in it."""
    return RawPrompt(begin + text, tuple(map(ImageFile, images)))


def meta_raw(text: str, images: Sequence[bytes] = ()) -> list[Any]:
    """The same as content for Meta's chat format, which puts begin-of-text first."""
    left = list(images)
    pieces = re.split(f"({re.escape(IMAGE)})", text)
    return [RawMediaItem(data=left.pop(0)) if piece == IMAGE else RawTextItem(text=piece) for piece in pieces if piece]


def our_chat(turns: Sequence[Turn]) -> ChatPrompt:
    """A conversation."""
    return ChatPrompt(tuple(Message(role, tuple(map(_our_part, parts))) for role, parts in turns))


def meta_chat(turns: Sequence[Turn]) -> list[Any]:
    """The same for Meta's chat format."""
    ends = {"assistant": {"stop_reason": StopReason.end_of_turn}}
    return [
        RawMessage(role=role, content=[_meta_part(part) for part in parts], **ends.get(role, {}))
        for role, parts in turns
    ]


def _our_part(part: Part) -> Text | ImageFile:
    return Text(part) if isinstance(part, str) else ImageFile(part)


def _meta_part(part: Part) -> Any:
    return RawTextItem(text=part) if isinstance(part, str) else RawMediaItem(data=part)
