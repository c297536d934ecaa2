"""Image files of every kind that is read, of one picture, and what each should become."""

import io
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from PIL.ExifTags import Base

__all__ = ["HEIGHT", "WIDTH", "encode", "expected", "kinds", "photograph"]

WIDTH, HEIGHT = 61, 43


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photograph(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """RGB with gradients and noise, [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return np.clip(smooth + np.random.default_rng(0).normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def expected(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a file, written the plain way: the whole image at once, in Pillow's own opener."""
    image = Image.open(io.BytesIO(data))
    image.load()
    orientation = image.getexif().get(Base.Orientation, 1)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
        image = grey  # type: ignore[assignment]  # no file any more
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)  # type: ignore[assignment]  # its class is of where it came from
    upright = Image.new("RGB", image.size)
    upright.paste(image.convert("RGB"))
    pixels = np.asarray(upright)
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    flips = {2: "x", 3: "xy", 4: "y", 6: "x", 7: "xy", 8: "y"}.get(orientation, "")
    return turned[:: -1 if "y" in flips else 1, :: -1 if "x" in flips else 1]


def kinds() -> dict[str, bytes]:
    """Files by name."""
    return dict(itertools.chain(_stills(), _turned()))


def _stills() -> Iterator[tuple[str, bytes]]:
    rgb = Image.fromarray(photograph())
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(noise))
    grey, palette, other = rgb.convert("L"), rgb.quantize(200), rgb.rotate(180)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    modes = {"rgb": rgb, "rgba": rgba, "grey": grey, "grey alpha": rgba.convert("LA"), "bilevel": rgb.convert("1")}
    modes |= {"palette": palette, "16 bits": deep}
    yield from ((f"PNG {name}", encode(image)) for name, image in modes.items())
    yield "PNG palette alpha", encode(palette, transparency=bytes(range(200)))
    yield "PNG colour key", encode(rgb, transparency=rgb.getpixel((3, 3)))
    yield "PNG grey key", encode(grey, transparency=grey.getpixel((3, 3)))
    yield "PNG 16 bits key", encode(deep, transparency=deep.getpixel((3, 3)))
    yield "PNG 2 bits", encode(rgb.quantize(4), bits=2)
    yield "PNG 4 bits", encode(rgb.quantize(15), bits=4)
    yield "PNG animated", encode(rgb, save_all=True, append_images=[other])
    yield "PNG animated beside a still", encode(rgb, save_all=True, default_image=True, append_images=[other])
    for subsampling, progressive in itertools.product((0, 1, 2), (False, True)):
        name = f"JPEG {subsampling} {'progressive' if progressive else 'baseline'}"
        yield name, encode(rgb, "JPEG", subsampling=subsampling, progressive=progressive)
    yield "JPEG restarts", encode(rgb, "JPEG", restart_marker_rows=1)
    yield from ((f"JPEG {mode}", encode(rgb.convert(mode), "JPEG")) for mode in ("L", "CMYK"))
    for name, image in (("rgb", rgb), ("alpha", rgba)):
        yield f"WebP {name}", encode(image, "WEBP")
        yield f"WebP lossless {name}", encode(image, "WEBP", lossless=True)
        yield f"WebP animated {name}", encode(image, "WEBP", save_all=True, append_images=[other])
    yield from ((f"GIF {mode}", encode(rgb.convert(mode), "GIF")) for mode in ("L", "P"))
    yield "GIF interlaced", encode(palette, "GIF", interlace=1)
    yield "GIF transparent", encode(palette, "GIF", transparency=palette.getpixel((3, 3)))
    yield "GIF animated", encode(rgb, "GIF", save_all=True, append_images=[other])
    yield from ((f"BMP {name}", encode(modes[name], "BMP")) for name in ("rgb", "rgba", "grey", "bilevel", "palette"))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for name, image in {**modes, "CMYK": rgb.convert("CMYK")}.items():
            yield f"TIFF {compression} {name}", encode(image, "TIFF", compression=compression)
    yield "TIFF JPEG", encode(rgb, "TIFF", compression="jpeg")
    yield "TIFF fax", encode(modes["bilevel"], "TIFF", compression="group4")
    yield from ((f"TIFF {mode}", encode(rgb.convert(mode), "TIFF")) for mode in ("YCbCr", "LAB"))
    yield "TIFF pages", encode(rgb, "TIFF", save_all=True, append_images=[other])


def _turned() -> Iterator[tuple[str, bytes]]:
    rgb = Image.fromarray(photograph())
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[Base.Orientation] = orientation
        for file_format in ("JPEG", "PNG", "WEBP"):
            yield f"{file_format} turned {orientation}", encode(rgb, file_format, exif=exif)
        xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
        for file_format in ("JPEG", "WEBP"):
            yield f"{file_format} turned by XMP {orientation}", encode(rgb, file_format, xmp=xmp.encode())
        for is_packed in (False, True):
            notes = PngImagePlugin.PngInfo()
            notes.add_itxt("XML:com.adobe.xmp", xmp, zip=is_packed)
            yield f"PNG turned by XMP {orientation} {is_packed}", encode(rgb, pnginfo=notes)
            notes, tags = PngImagePlugin.PngInfo(), b"Exif\0\0" + exif.tobytes()
            notes.add_text("Raw profile type exif", f"\nexif\n{len(tags):8}\n{tags.hex()}\n", zip=is_packed)
            yield f"PNG turned by a raw profile {orientation} {is_packed}", encode(rgb, pnginfo=notes)
