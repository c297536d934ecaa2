"""Image files into pixels, and pixels into tiles: the same on every machine.

Decoding is Pillow's; resizing, tiling and normalising are done by transformers' Pillow image processor, never
by torchvision's, which resamples differently. It knows nothing about prompts.
"""

import hashlib
import io
import warnings
from typing import Final

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as PilImage
from PIL.ExifTags import Base as ExifTag
from PIL.Image import Image, Transpose
from PIL.ImageFile import ImageFile
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
)

from trimserve.errors import InvalidRequest
from trimserve.model.prepared import PreparedImage

__all__ = ["count_pixels", "decode_image", "prepare_image"]

_FORMATS: Final[dict[str, type[ImageFile]]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

_TURNS: Final = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright."""

# Pillow warns about odd metadata in a client's file, for which an operator can do nothing. Once for the
# process: `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


def count_pixels(data: bytes, field: str, max_pixels: int) -> int:
    """Width times height of an image file; reads its header only.

    Args:
        data: the file.
        field: see `decode_image`.
        max_pixels: see `decode_image`.
    Raises:
        InvalidRequest: what `decode_image` refuses before it decodes.
    """
    _, image = _read_header(data, field, max_pixels)
    return image.width * image.height


def decode_image(data: bytes, field: str, max_pixels: int) -> Image:
    """Read an image file as upright 8-bit RGB.

    The format is sniffed from the content: PNG, JPEG, WebP, GIF, BMP or TIFF. The EXIF orientation is
    applied, alpha is composited over white, 16 bits are scaled to 8, CMYK, palette and greyscale are
    converted, and of an animated image the first frame is taken. Embedded colour profiles are ignored.

    Args:
        data: the file.
        field: the request's field that holds it, for the error.
        max_pixels: largest width times height, compared with the header before any pixel is decoded; at most
            178,956,970, where Pillow itself refuses.
    Returns:
        The image, at least 1 x 1 pixels.
    Raises:
        InvalidRequest: empty, not an image, cut off, too many pixels, or pixels without a defined 8-bit
            meaning (floating point, integers past 16 bits).
    """
    name, image = _read_header(data, field, max_pixels)
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(_to_8_bits(image))
    except MemoryError:
        raise
    except Exception as error:  # on a malformed file Pillow raises whatever its parsing meets
        expected = f"must be a complete, readable {name} image"
        raise InvalidRequest(field, f"{expected}, got {len(data)} bytes: {error}") from error
    return rgb if turn is None else rgb.transpose(turn)


def prepare_image(image: Image, processor: MllamaImageProcessorPil) -> PreparedImage:
    """Resize an image into its tile grid, cut it into tiles and normalise them.

    Args:
        image: RGB, of any size from 1 x 1 on; a side may come out as a single pixel.
        processor: the checkpoint's image processor.
    """
    tile_size, max_tiles = int(processor.size["height"]), int(processor.max_image_tiles)
    encoded = processor.preprocess(image, return_tensors="pt")
    aspect_ratio_id = int(encoded["aspect_ratio_ids"].item())
    tiles_high, tiles_wide = get_all_supported_aspect_ratios(max_tiles)[aspect_ratio_id - 1]
    content_height, content_width = get_image_size_fit_to_canvas(
        image.height, image.width, tiles_high * tile_size, tiles_wide * tile_size, tile_size
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


def _read_header(data: bytes, field: str, max_pixels: int) -> tuple[str, ImageFile]:
    if not data:
        raise InvalidRequest(field, "must be an image file, got 0 bytes")
    # Not `PIL.Image.open`: it compares the size with a bound that only the process as a whole can set.
    for name, image_class in _FORMATS.items():
        _, accepts = PilImage.OPEN[str(image_class.format)]
        if accepts is not None and not accepts(data[:16]):  # some releases leave that to the decoder's own errors
            continue
        try:
            image = image_class(io.BytesIO(data))
        except SyntaxError:  # Pillow's way of saying: not this format
            continue
        except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
            raise InvalidRequest(field, f"must have at most {max_pixels} pixels: {error}") from error
        except Exception as error:  # as in decode_image
            raise InvalidRequest(field, f"must be a well-formed {name} image: {error}") from error
        num_pixels = image.width * image.height
        if num_pixels > max_pixels:
            size = f"{image.width} x {image.height} = {num_pixels}"
            raise InvalidRequest(field, f"must have at most {max_pixels} pixels, got {size}")
        return name, image
    formats = ", ".join(_FORMATS)
    raise InvalidRequest(field, f"must be an image file ({formats}), got {len(data)} bytes of something else")


def _orientation(image: Image) -> int:
    # After loading: a PNG may hold EXIF behind the pixels, and a TIFF has been turned, its tag dropped.
    try:
        return int(image.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # noqa: BLE001 - unreadable metadata says nothing about the pixels
        return 1


def _to_8_bits(image: Image) -> Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; convert them to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integer pixels must be in [0, 65535], got {values.min()} to {values.max()}")
    grey = PilImage.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(PilImage.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_rgb(image: Image) -> Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = PilImage.new("RGBA", rgba.size, "white")
    return PilImage.alpha_composite(white, rgba).convert("RGB")
