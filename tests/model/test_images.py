"""Image files of every kind into RGB, and RGB into tiles."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from trimserve.errors import InvalidRequest
from trimserve.model.images import decode_image, prepare_image

MAX_PIXELS = 1_000_000
FIELD = "chat.messages[0].parts[0].image"


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    return decode_image(data, FIELD, MAX_PIXELS)


def png(width: int, height: int, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 5], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_every_format_is_sniffed_by_content(file_format: str) -> None:
    image = Image.new("RGB", (24, 16), (200, 40, 90))
    pixels = np.asarray(decode(encode(image, file_format))).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels - (200, 40, 90)).max() <= 8  # the lossy ones come close


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(file_format: str, orientation: int) -> None:
    upright = Image.new("RGB", (40, 24))
    upright.paste((255, 0, 0), (0, 0, 20, 12))
    upright.paste((0, 255, 0), (20, 0, 40, 12))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    decoded = decode(encode(stored, file_format, exif=exif))
    assert decoded.size == (40, 24)
    assert decoded.getpixel((6, 4))[0] > 200 > 60 > decoded.getpixel((6, 4))[1]  # type: ignore[index]  # RGB gives tuples
    assert decoded.getpixel((34, 4))[1] > 200  # type: ignore[index]


def test_unreadable_exif_is_no_reason_to_refuse_an_image() -> None:
    decoded = decode(encode(gradient(), "PNG", exif=b"Exif\x00\x00II*\x00garbage"))
    assert np.array_equal(np.asarray(decoded), np.asarray(gradient()))


def transparent_palette() -> tuple[Image.Image, dict[str, object]]:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    return image, {"transparency": b"\x00\xff"}


ALPHA_CASES = [  # image of two pixels, save options; the left is fully transparent, the right opaque
    (Image.fromarray(np.array([[[10, 20, 30, 0], [200, 100, 0, 255]]], np.uint8), "RGBA"), {}, (200, 100, 0)),
    (Image.fromarray(np.array([[[10, 0], [77, 255]]], np.uint8), "LA"), {}, (77, 77, 77)),
    (*transparent_palette(), (200, 100, 0)),
    (Image.fromarray(np.array([[10, 77]], np.uint8)), {"transparency": 10}, (77, 77, 77)),
    (Image.fromarray(np.array([[10, 77 * 257]], np.uint16)), {"transparency": 10}, (77, 77, 77)),
    (
        Image.fromarray(np.array([[[1, 2, 3], [200, 100, 0]]], np.uint8)),
        {"transparency": (1, 2, 3)},
        (200, 100, 0),
    ),
]


@pytest.mark.parametrize(("image", "options", "opaque"), ALPHA_CASES)
def test_alpha_is_composited_over_white(
    image: Image.Image, options: dict[str, object], opaque: tuple[int, int, int]
) -> None:
    decoded = decode(encode(image, "PNG", **options))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == opaque


def test_half_transparent_black_is_grey() -> None:
    decoded = decode(encode(Image.new("RGBA", (3, 3), (0, 0, 0, 128))))
    assert decoded.getpixel((1, 1)) == (127, 127, 127)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_the_nearest_8_bit_value(file_format: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(decode(encode(Image.fromarray(values), file_format)))
    assert np.abs(decoded - (values / 257)[..., None]).max() <= 0.5


def test_16_bit_colour_is_scaled_not_clipped() -> None:
    row = b"\x00" + struct.pack(">6H", 0, 300, 65535, 32768, 12345, 60000)
    pixels = np.asarray(decode(png(2, 1, 16, 2, row)), dtype=int).ravel()
    assert np.abs(pixels - np.array([0, 300, 65535, 32768, 12345, 60000]) / 257).max() <= 1


def test_cmyk_palette_greyscale_and_bilevel_become_rgb() -> None:
    assert decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")).getpixel((0, 0)) == (0, 255, 255)
    cyan = np.asarray(decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")), dtype=int)
    assert np.abs(cyan - (0, 255, 255)).max() <= 8
    assert decode(encode(gradient().quantize(256))).mode == "RGB"
    assert decode(encode(Image.new("L", (2, 2), 99))).getpixel((0, 0)) == (99, 99, 99)
    assert decode(encode(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_taken(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((8, 8)) == (255, 0, 0)


REFUSED = [
    (b"", "must be an image file, got 0 bytes"),
    (
        b"this is a text, not an image",
        r"must be an image file \(PNG, JPEG, .*\), got 28 bytes of something else",
    ),
    (encode(gradient(2000, 1000)), r"must have at most 1000000 pixels, got 2000 x 1000 = 2000000"),
    (png(0, 4, 8, 2, b""), "of something else"),
    (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point pixels have no defined white"),
    (
        encode(Image.new("I", (4, 4), 70000), "TIFF"),
        r"integer pixels must be in \[0, 65535\], got 70000 to 70000",
    ),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_refused_images_are_named_with_field_and_bound(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        decode(data)
    assert caught.value.field == FIELD


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_cut_off_files_are_refused(file_format: str, kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, file_format)
    with pytest.raises(InvalidRequest, match=FIELD.replace("[", r"\[")):
        decode(data[: int(len(data) * kept)])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_are_decoded_or_refused_but_raise_nothing_else(file_format: str) -> None:
    generator = np.random.default_rng(1)
    data = np.frombuffer(encode(gradient(), file_format, exif=Image.Exif()), np.uint8)
    for _ in range(150):
        damaged = data.copy()
        damaged[generator.integers(0, len(data), 3)] = generator.integers(0, 256, 3)
        try:
            decoded = decode(damaged.tobytes())
        except InvalidRequest:
            continue
        assert decoded.mode == "RGB"


def test_decompression_bomb_is_refused_by_its_header_without_a_warning() -> None:
    bomb = png(50_000, 50_000, 8, 2, b"")  # no pixels at all: decoding them would fail differently
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InvalidRequest, match="at most 1000000 pixels, got 50000 x 50000 = 2500000000"):
            decode(bomb)
    assert not caught


def test_decoding_in_many_threads_gives_the_same_pixels() -> None:
    data = encode(gradient(200, 150), "JPEG")
    expected = np.asarray(decode(data))
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(np.asarray(image), expected) for image in pool.map(decode, [data] * 64))


TILE = 28
GRIDS = [  # width, height, (tiles high, tiles wide), (content height, content width)
    (28, 28, (1, 1), (28, 28)),
    (1, 1, (1, 1), (28, 28)),
    (56, 28, (1, 2), (28, 56)),
    (28, 56, (2, 1), (56, 28)),
    (500, 500, (2, 2), (56, 56)),
    (500, 400, (2, 2), (44, 56)),
    (1, 10000, (4, 1), (112, 1)),
    (10000, 1, (1, 4), (1, 112)),
    (3, 3, (1, 1), (28, 28)),
    (10000, 3, (1, 4), (1, 112)),
]


@pytest.fixture(scope="module")
def processor() -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)


@pytest.mark.parametrize(("width", "height", "grid", "content"), GRIDS)
def test_tile_grid_and_content_of_any_shape(
    processor: MllamaImageProcessorPil,
    width: int,
    height: int,
    grid: tuple[int, int],
    content: tuple[int, int],
) -> None:
    prepared = prepare_image(Image.new("RGB", (width, height), "white"), processor)
    assert (prepared.tiles_high, prepared.tiles_wide) == grid
    assert (prepared.content_height, prepared.content_width) == content
    assert prepared.num_tiles == grid[0] * grid[1]
    assert prepared.pixel_values.shape == (4, 3, TILE, TILE)
    assert prepared.pixel_values.dtype == torch.float32
    assert not prepared.pixel_values[prepared.num_tiles :].any()

    # white content is positive after normalisation, padding of the canvas (black) negative
    tiles = prepared.pixel_values[: prepared.num_tiles, 0].reshape(*grid, TILE, TILE)
    canvas = tiles.transpose(1, 2).reshape(grid[0] * TILE, grid[1] * TILE)
    expected = torch.zeros_like(canvas, dtype=torch.bool)
    expected[: content[0], : content[1]] = True
    assert torch.equal(canvas > 0, expected)


def test_aspect_ratio_ids_count_supported_grids_from_one(processor: MllamaImageProcessorPil) -> None:
    supported = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    for index, (tiles_high, tiles_wide) in enumerate(supported):
        image = Image.new("RGB", (tiles_wide * TILE, tiles_high * TILE))
        prepared = prepare_image(image, processor)
        assert (prepared.tiles_high, prepared.tiles_wide) == (tiles_high, tiles_wide)
        assert prepared.aspect_ratio_id == index + 1
