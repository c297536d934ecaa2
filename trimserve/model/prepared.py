"""A prompt on its way to the model: tokenised first, then with its images as tiles.

Plain frozen data, made by `processor.py` and by the engine, read by `mllama.py`.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from trimserve.api.prompt import ImageFile, Region

__all__ = ["PreparedImage", "PreparedPrompt", "TokenizedPrompt"]


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image as the vision encoder takes it."""

    pixel_values: Tensor
    """float32 [max_tiles, 3, tile_size, tile_size], normalised; tiles past `num_tiles` are zero."""
    aspect_ratio_id: int
    """Position of the tile grid in the model's list of supported grids, counted from 1."""
    tiles_high: int
    tiles_wide: int
    content_height: int
    """Pixels of the tile canvas that the resized image covers, from the top; the rest is padding."""
    content_width: int
    """The same from the left."""
    key: bytes
    """Hash of what the vision encoder sees: images with equal keys have equal features."""

    @property
    def num_tiles(self) -> int:
        """Tiles that hold a part of the image, row-major on the grid."""
        return self.tiles_high * self.tiles_wide


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A tokenised prompt whose image files are yet to be decoded."""

    token_ids: tuple[int, ...]
    """At least one id, each below the vocabulary's size or the image token's."""
    images: tuple[ImageFile, ...]
    """As many as `token_ids` has image tokens, in their order."""

    def closer(self, region: Region, image_token_id: int) -> "TokenizedPrompt":
        """The prompt with a region of its one image as a second image: rows that see the image see both."""
        [image] = self.images
        place = self.token_ids.index(image_token_id)
        token_ids = (*self.token_ids[:place], image_token_id, *self.token_ids[place:])
        return TokenizedPrompt(token_ids, (image, replace(image, region=region)))


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A tokenised prompt with its images' tiles."""

    token_ids: tuple[int, ...]
    """At least one id, each below the vocabulary's size or the image token's."""
    images: tuple[PreparedImage, ...]
    """As many as `token_ids` has image tokens, in their order."""
