"""Image files of every kind into RGB."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base

from tests.imaging.kinds import HEIGHT, WIDTH, encode, expected, kinds, photograph
from trimserve.errors import InvalidRequest
from trimserve.imaging import decode as decoding
from trimserve.imaging.decode import decode_image, decode_pixels

MAX_PIXELS = 1_000_000
FIELD = "chat.messages[0].parts[0].image"


def decode(data: bytes) -> Image.Image:
    return decode_image(data, FIELD, MAX_PIXELS)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""
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
    assert decoded.getpixel((34, 4))[1] > 200  # type: ignore[index]  # a pixel of RGB


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


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "key", "shown"),
    [  # the first sample is the transparent one
        (1, 0, b"\x80", (1,), (255, 0)),
        (2, 0, b"\x70", (1,), (255, 255)),
        (2, 0, b"\x60", (1,), (255, 170)),
        (4, 0, b"\x5a", (5,), (255, 170)),
        (4, 0, b"\x5a", (0xFF5,), (255, 170)),  # only as many bits as there are count
        (8, 0, b"\x05\x55", (5,), (255, 85)),
        (16, 0, b"\x12\x34\x01\x01", (0x1234,), (255, 1)),
        (8, 2, b"\1\2\3\5\5\5", (1, 2, 3), (255, 5)),
        (16, 2, struct.pack(">6H", 291, 547, 803, 0x505, 0x505, 0x505), (291, 547, 803), (255, 5)),
    ],
)
def test_a_transparent_colour_of_a_png_is_found_at_any_depth(
    depth: int, colour_type: int, row: bytes, key: tuple[int, ...], shown: tuple[int, int]
) -> None:
    data = png(2, 1, depth, colour_type, b"\0" + row)
    transparency = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    decoded = decode(data[:33] + transparency + data[33:])
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(level,) * 3 for level in shown]


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
    (png(0, 4, 8, 2, b""), "a PNG file of 65 bytes that cannot be read"),
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


KINDS = kinds()


@pytest.mark.parametrize("band_pixels", [1, 200, 2**20])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_pillow_reads_it_in_whatever_bands(
    name: str, band_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BAND_PIXELS", band_pixels)
    assert np.array_equal(decode_pixels(KINDS[name], FIELD, MAX_PIXELS), expected(KINDS[name]))


MIB = 2**20
NOISE = np.random.default_rng(0).bytes(2 * MIB)
METADATA = {
    "text": chunk(b"tEXt", b"workflow\0" + b"a" * 3 * MIB),
    "packed text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 3 * MIB)),
    "packed international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 3 * MIB)),
    "many texts": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * MIB)) * 70,
    "colour profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(NOISE)),
    "colour profile that is none": chunk(b"iCCP", b"s"),
    "resolution that is none": chunk(b"pHYs", b"1"),
    "EXIF that is none": chunk(b"eXIf", NOISE),
    "wrong checksum": chunk(b"tEXt", b"workflow\0a")[:-4] + b"none",
    "XMP that does not unpack": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0none"),
    "XMP that is cut off": chunk(b"iTXt", b"XML:com.adobe.xmp"),
}


@pytest.mark.parametrize("is_last", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_a_png_never_refuses_its_pixels(name: str, is_last: bool) -> None:
    data = encode(gradient())
    place = len(data) - 12 if is_last else 33
    decoded = decode(data[:place] + METADATA[name] + data[place:])
    assert np.array_equal(np.asarray(decoded), np.asarray(gradient()))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"icc_profile": NOISE}),
        ("WEBP", {"icc_profile": NOISE}),
        ("WEBP", {"xmp": NOISE}),
        ("TIFF", {"icc_profile": NOISE}),
        ("TIFF", {"description": "a" * 3 * MIB}),
        ("GIF", {"comment": b"a" * 3 * MIB}),
    ],
)
def test_metadata_of_other_formats_does_neither(file_format: str, options: dict[str, object]) -> None:
    assert decode(encode(gradient(), file_format, **options)).size == gradient().size


def test_the_orientation_is_found_in_xmp_of_any_size() -> None:
    xmp = b"a" * 3 * MIB + b'tiff:Orientation="6"'
    data = encode(gradient())
    note = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    decoded = decode(data[:33] + note + data[33:])
    assert np.array_equal(np.asarray(decoded), np.rot90(np.asarray(gradient()), -1))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}], ids=["raw", "packed", "tiles"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_white_is_white_where_it_is_stored_as_zero(
    kind: type[np.unsignedinteger[Any]], options: dict[str, Any], byteorder: Literal["<", ">"]
) -> None:
    most = np.iinfo(kind).max
    stored = np.linspace(0, most, 64 * 48).reshape(48, 64).round().astype(kind)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stored, photometric="miniswhite", byteorder=byteorder, **options)
    decoded = np.asarray(decode(buffer.getvalue()))
    assert np.abs(decoded - (255 - stored / most * 255)[..., None]).max() <= 0.5


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("photometric", "shown"), [(0, (255, 0)), (1, (0, 255))])
def test_12_bits_are_scaled_by_their_own_white(photometric: int, shown: tuple[int, int], byteorder: str) -> None:
    pixels = bytes([0x00, 0x0F, 0xFF])  # 0 and 4095
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack(f"{byteorder}HHII", tag, 4, 1, value) for tag, value in tags)
    begin = struct.pack(f"{byteorder}2sHIH", b"II" if byteorder == "<" else b"MM", 42, 8, len(tags))
    data = begin + entries + struct.pack(f"{byteorder}I", 0) + pixels
    assert np.asarray(decode(data))[0, :, 0].tolist() == list(shown)


ALPHA_MASKS = {  # bytes of a pixel; masks of red, green, blue and alpha
    "BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    "ABGR": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    "BGAR": (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
}


def bmp(rgba: NDArray[np.uint8], order: str, header_size: int, has_masks: bool = True) -> bytes:
    """A BMP of 32 bits; without masks the fourth byte has no meaning."""
    height, width, _ = rgba.shape
    pixels = rgba[::-1][..., ["RGBA".index(letter) for letter in order]].tobytes()
    fields = (header_size, width, height, 1, 32, 3 if has_masks else 0, len(pixels), 0, 0, 0, 0)
    header = struct.pack("<IiiHHIIiiII", *fields) + struct.pack("<4I", *ALPHA_MASKS[order]) * has_masks
    header = header.ljust(header_size, b"\0")
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + pixels


@pytest.mark.parametrize("header_size", [56, 108, 124])
@pytest.mark.parametrize("order", ALPHA_MASKS)
def test_a_bmp_whose_alpha_is_all_zero_is_opaque(order: str, header_size: int) -> None:
    picture = photograph()
    padded = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    assert np.array_equal(np.asarray(decode(bmp(padded, order, header_size))), picture)
    padded[0, 0, 3] = 1  # now it is an alpha
    assert (np.asarray(decode(bmp(padded, order, header_size)))[1:] == 255).all()


def test_padding_of_a_bmp_without_alpha_has_no_meaning() -> None:
    padded = np.dstack([photograph(), np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)])
    assert np.array_equal(np.asarray(decode(bmp(padded, "BGRA", 40, has_masks=False))), photograph())


def test_a_tiff_is_opaque_where_an_alpha_of_all_zero_is_not_declared() -> None:
    picture = photograph()
    data = encode(Image.fromarray(np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])), "TIFF")
    assert (np.asarray(decode(data)) == 255).all()
    declaration = struct.pack("<HH", 338, 3)  # ExtraSamples, renamed to a tag of nobody's
    assert data.count(declaration) == 1
    undeclared = data.replace(declaration, struct.pack("<HH", 65000, 3))
    assert np.array_equal(np.asarray(decode(undeclared)), picture)
