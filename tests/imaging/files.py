"""Image files that cost more than their pixels warrant."""

import struct
import zlib

from PIL import Image

from tests.imaging.kinds import encode

__all__ = ["empty_scans", "huge_tile", "tiny_chunks"]


def empty_scans(num_scans: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated: each goes over all coefficients and changes none."""
    data = encode(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * num_scans + data[-2:]


def huge_tile(side: int) -> bytes:
    """A TIFF of one pixel, in a tile of side * side."""
    packed = zlib.compress(bytes(side * side))
    tags = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    offset = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(324, offset), (325, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + packed


def tiny_chunks(num_chunks: int) -> bytes:
    """A PNG with as many chunks that hold nothing."""
    data = encode(Image.new("RGB", (8, 8)))
    return data[:33] + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")) * num_chunks + data[33:]
