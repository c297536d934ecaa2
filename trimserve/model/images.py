"""Pixels into tiles: the same on every machine.

Resizing, tiling and normalising are done by transformers' Pillow image processor, never by torchvision's, which
resamples differently. Image files become pixels in `imaging/`. It knows nothing about prompts.
"""

import hashlib
from typing import Any

from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
)

from trimserve.api.prompt import Region
from trimserve.imaging.decode import Pixels, decode_image
from trimserve.model.prepared import PreparedImage

__all__ = ["crop", "decode_image", "prepare_image"]


def prepare_image(pixels: Pixels, processor: MllamaImageProcessorPil) -> PreparedImage:
    """Resize an image into its tile grid, cut it into tiles and normalise them.

    Args:
        pixels: of any size from 1 x 1 on; a side may come out as a single pixel.
        processor: the checkpoint's image processor.
    """
    tile_size, max_tiles = int(processor.size["height"]), int(processor.max_image_tiles)
    # They are RGB with the channels last; it would guess so, wrongly of an image that is 3 pixels high.
    told: dict[str, Any] = {"do_convert_rgb": False, "input_data_format": "channels_last"}
    encoded = processor.preprocess(pixels, return_tensors="pt", **told)
    aspect_ratio_id = int(encoded["aspect_ratio_ids"].item())
    tiles_high, tiles_wide = get_all_supported_aspect_ratios(max_tiles)[aspect_ratio_id - 1]
    content_height, content_width = get_image_size_fit_to_canvas(
        pixels.shape[0], pixels.shape[1], tiles_high * tile_size, tiles_wide * tile_size, tile_size
    )
    pixel_values: Tensor = encoded["pixel_values"][0, 0]
    real = pixel_values[: tiles_high * tiles_wide].contiguous()
    return PreparedImage(
        pixel_values=pixel_values,
        aspect_ratio_id=aspect_ratio_id,
        tiles_high=tiles_high,
        tiles_wide=tiles_wide,
        content_height=int(content_height),
        content_width=int(content_width),
        key=hashlib.sha256(bytes([aspect_ratio_id]) + real.numpy().data).digest(),
    )


def crop(pixels: Pixels, region: Region) -> Pixels:
    """The pixels of a region, at least one; a view."""
    height, width, _ = pixels.shape
    rows, columns = _stretch(region.top, region.height, height), _stretch(region.left, region.width, width)
    return pixels[rows, columns]


def _stretch(begin: float, share: float, num_pixels: int) -> slice:
    first = min(round(begin * num_pixels), num_pixels - 1)
    return slice(first, max(first + 1, round((begin + share) * num_pixels)))
