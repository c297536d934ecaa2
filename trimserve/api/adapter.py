"""A loaded adapter as everyone may know it, and what names it may have."""

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["ADAPTER_NAME", "ADAPTER_NAME_RULE", "AdapterInfo", "LoadedAdapter"]

ADAPTER_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Every name of an adapter."""

ADAPTER_NAME_RULE: Final = "1 to 64 of A-Z a-z 0-9 . _ and -"
"""The same for people."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA beside the base model."""

    name: str
    """By which requests ask for it."""
    folder: str
    """Where it was read."""
    num_bytes: int
    """Of its weights, as they are held."""
    rank: int
    """The largest of its ranks; 0 if it only replaces weights."""
    modules: tuple[str, ...]
    """Kinds of layers that it changes, such as `model.language_model.layers.*.self_attn.q_proj`."""
    changes_image_features: bool
    """Whether visual features are its own; else the image cache's are shared with the base model."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter at one moment."""

    info: AdapterInfo
    num_requests: int
    """Requests that have it, running or waiting."""
    is_unloading: bool
    """Whether it goes when those have ended; new requests are refused."""
