"""Image files into upright 8-bit RGB: the same on every machine.

Decoding is Pillow's. It knows nothing of processes, requests and tiles. What a file may cost is bounded by the process
that decodes it (`worker.py`); called directly, it is for files that are trusted.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as PilImage
from PIL.ExifTags import Base as ExifTag
from PIL.Image import Image, Transpose
from PIL.ImageFile import ImageFile

from trimserve.errors import InvalidRequest
from trimserve.imaging.png import SIGNATURE, without_metadata
from trimserve.imaging.tiff import WHITE_IS_ZERO, TiffFile

__all__ = ["Decode", "ImageReader", "Pixels", "decode_image", "decode_pixels"]

Pixels = NDArray[np.uint8]
"""[height, width, 3], upright RGB."""

Decode = Callable[[bytes, str], AbstractContextManager[Pixels]]
"""Decodes a file that a field of the request holds; InvalidRequest if it cannot be decoded. The pixels last until the
block is left."""

_FORMATS: Final[dict[str, type[ImageFile]]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffFile,
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
_SWAPS_SIDES: Final = {5, 6, 7, 8}
"""Orientations in which a column is stored as a row."""
_LAST_COMES_FIRST: Final = {3, 4, 7, 8}
"""Orientations in which the upper rows are stored as the last rows or columns."""

_BAND_PIXELS: Final = 2**20
"""Converted at a time: beside the stored pixels and the result there is no third copy of the image."""

# Pillow warns about odd metadata in a client's file, for which an operator can do nothing. Once for the
# process: `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_pixels(data: bytes, field: str, max_pixels: int) -> Pixels:
    """Read an image file as upright 8-bit RGB.

    The format is sniffed from the content: PNG, JPEG, WebP, GIF, BMP or TIFF. The orientation of EXIF or XMP is
    applied, alpha is composited over white, 16 bits are scaled to 8, CMYK, palette and greyscale are converted, and
    of an animated image the first frame is taken. Embedded colour profiles are ignored.

    Args:
        data: the file.
        field: the request's field that holds it, for the error.
        max_pixels: largest width times height, compared with the header before any pixel is decoded; at most
            178,956,970, where Pillow itself refuses.
    Returns:
        uint8 [height, width, 3], at least 1 x 1 pixels.
    Raises:
        InvalidRequest: empty, not an image, cut off, too many pixels, or pixels without a defined 8-bit
            meaning (floating point, integers past 16 bits).
    """
    return np.concatenate(list(ImageReader(data, field, max_pixels).bands()))


def decode_image(data: bytes, field: str, max_pixels: int) -> Image:
    """The same as an RGB image of Pillow's, for programs that draw on it."""
    return PilImage.fromarray(decode_pixels(data, field, max_pixels))


class ImageReader:
    """An image file whose header was read."""

    def __init__(self, data: bytes, field: str, max_pixels: int) -> None:
        """Read the header; see `decode_pixels`.

        Raises:
            InvalidRequest: what can be refused without decoding pixels.
        """
        self._field, self._num_bytes = field, len(data)
        self._format, self._image = _open(data, field, max_pixels)

    @property
    def num_pixels(self) -> int:
        """Width times height."""
        return self._image.width * self._image.height

    def bands(self) -> Iterator[Pixels]:
        """Decode the pixels; once.

        Yields:
            uint8 [some rows, width, 3] from the top down.
        Raises:
            InvalidRequest: the file is not complete, or has no defined 8-bit meaning.
        """
        image = self._image
        try:
            is_inverted = _is_inverted(image)
            image.load()
            _make_opaque(image)
            most = _most_value(image)
            for band in _upright_bands(image, _orientation(image)):
                yield np.asarray(_to_rgb(band if most is None else _to_8_bits(band, most, is_inverted)))
        except MemoryError:
            raise
        except Exception as error:  # on a malformed file Pillow raises whatever its parsing meets
            expected = f"must be a complete, readable {self._format} image"
            raise InvalidRequest(self._field, f"{expected}, got {self._num_bytes} bytes: {error}") from error


def _open(data: bytes, field: str, max_pixels: int) -> tuple[str, ImageFile]:
    if not data:
        raise InvalidRequest(field, "must be an image file, got 0 bytes")
    content = without_metadata(data) if data.startswith(SIGNATURE) else data
    other = f"got {len(data)} bytes of something else"
    # Not `PIL.Image.open`: it compares the size with a bound that only the process as a whole can set.
    for name, image_class in _FORMATS.items():
        _, accepts = PilImage.OPEN[str(image_class.format)]
        if accepts is not None and not accepts(data[:16]):  # some releases leave that to the decoder's own errors
            continue
        try:
            image = image_class(io.BytesIO(content))
        except MemoryError:
            raise
        except SyntaxError as error:  # Pillow's way of saying: not this format, or a kind of it that it does not know
            if accepts is not None:
                other = f"got a {name} file of {len(data)} bytes that cannot be read: {error}"
            continue
        except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
            raise InvalidRequest(field, f"must have at most {max_pixels} pixels: {error}") from error
        except Exception as error:  # as in `bands`
            raise InvalidRequest(field, f"must be a well-formed {name} image: {error}") from error
        num_pixels = image.width * image.height
        if num_pixels > max_pixels:
            size = f"{image.width} x {image.height} = {num_pixels}"
            raise InvalidRequest(field, f"must have at most {max_pixels} pixels, got {size}")
        return name, image
    formats = ", ".join(_FORMATS)
    raise InvalidRequest(field, f"must be an image file ({formats}), {other}")


def _orientation(image: Image) -> int:
    # After loading: a PNG may hold EXIF behind the pixels, and a TIFF has been turned, its tag dropped.
    try:
        return int(image.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # noqa: BLE001 - unreadable metadata says nothing about the pixels
        return 1


def _is_inverted(image: ImageFile) -> bool:
    """Whether a TIFF stores white as zero in a way that Pillow does not turn into black is zero."""
    return (
        isinstance(image, TiffFile)
        and image.mode.startswith("I;16")
        and image.tag_v2.get(ExifTag.PhotometricInterpretation) == WHITE_IS_ZERO
    )


def _make_opaque(image: ImageFile) -> None:
    """Drop an alpha of nothing but zeros where it may be padding: in a BMP, and in a TIFF that does not declare it."""
    is_declared = not isinstance(image, BmpImagePlugin.BmpImageFile)
    if isinstance(image, TiffFile):
        is_declared = ExifTag.ExtraSamples in image.tag_v2
    if image.mode == "RGBA" and not is_declared and image.getchannel("A").getextrema()[1] == 0:
        image.putalpha(255)


def _upright_bands(image: Image, orientation: int) -> Iterator[Image]:
    """Cut an image into bands of whole rows, from the top down once it is upright."""
    is_column = orientation in _SWAPS_SIDES
    length, width = image.size if is_column else image.size[::-1]
    step = max(1, _BAND_PIXELS // width)
    begins = range(0, length, step)
    for begin in reversed(begins) if orientation in _LAST_COMES_FIRST else begins:
        end = min(begin + step, length)
        band = image.crop((begin, 0, end, width) if is_column else (0, begin, width, end))
        yield band.transpose(_TURNS[orientation]) if orientation in _TURNS else band


def _most_value(image: Image) -> int | None:
    """What stands for white in an image of integers past 8 bits, None for others; refuses what has no white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; convert them to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    if image.mode == "I":
        values = np.asarray(image)
        least, most = values.min(), values.max()
        if least < 0 or most > 65535:
            raise ValueError(f"integer pixels must be in [0, 65535], got {least} to {most}")
    if isinstance(image, TiffFile) and image.tag_v2.get(ExifTag.BitsPerSample) == (12,):
        return 4095
    return 65535


def _to_8_bits(image: Image, most: int, is_inverted: bool) -> Image:
    values = np.asarray(image).astype(np.uint32)
    if is_inverted:
        values = most - values
    grey = PilImage.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(PilImage.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_rgb(image: Image) -> Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = PilImage.new("RGBA", rgba.size, "white")
    return PilImage.alpha_composite(white, rgba).convert("RGB")
