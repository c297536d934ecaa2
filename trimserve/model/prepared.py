"""A prompt on its way to the model: tokenised first, then with its images as tiles.

Plain frozen data, made by `processor.py` and by the engine, read by `mllama.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimserve.api.prompt import ImageFile

if TYPE_CHECKING:  # loads transformers, which the engine does without
    from trimserve.model.images import PreparedImage

__all__ = ["PreparedPrompt", "TokenizedPrompt"]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A tokenised prompt whose image files are yet to be decoded."""

    token_ids: tuple[int, ...]
    """At least one id, each below the vocabulary's size or the image token's."""
    images: tuple[ImageFile, ...]
    """As many as `token_ids` has image tokens, in their order."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A tokenised prompt with its images' tiles."""

    token_ids: tuple[int, ...]
    """At least one id, each below the vocabulary's size or the image token's."""
    images: "tuple[PreparedImage, ...]"
    """As many as `token_ids` has image tokens, in their order."""
