"""Image files that are small to send and dear to open."""

import io
import struct
import zlib
from functools import cache

from PIL import Image

__all__ = ["endless_jpeg", "marker_jpeg", "tiled_tiff", "tiny_chunk_png"]

_TILE = 26736
"""Edge of a tile: its bytes just fit into what TIFF's decoders allocate."""

_NUM_SCANS = 100_000
_NUM_CHUNKS = 500_000


@cache
def tiled_tiff() -> bytes:
    """One pixel, in a tile of 26736 x 26736: the decoder allocates the tile."""
    packer = zlib.compressobj(9)
    row = bytes(_TILE)
    tile = b"".join(packer.compress(row) for _ in range(_TILE)) + packer.flush()
    tags = [  # (tag, type: 3 is 16 bits, 4 is 32 bits, value)
        (256, 3, 1),  # width
        (257, 3, 1),  # height
        (258, 3, 8),  # bits of a sample
        (259, 3, 8),  # deflate
        (262, 3, 1),  # black is zero
        (277, 3, 1),  # samples of a pixel
        (322, 4, _TILE),
        (323, 4, _TILE),
        (324, 4, 0),  # where the tile is, see below
        (325, 4, len(tile)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 324 else value) for tag, kind, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + tile


@cache
def endless_jpeg() -> bytes:
    """A progressive JPEG with a hundred thousand scans that refine nothing: each one goes over the whole image."""
    picture = io.BytesIO()
    Image.new("L", (4096, 4096)).save(picture, "JPEG", progressive=True)
    empty_scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return picture.getvalue().removesuffix(b"\xff\xd9") + empty_scan * _NUM_SCANS + b"\xff\xd9"


@cache
def tiny_chunk_png() -> bytes:
    """A PNG with half a million empty chunks before its pixels."""
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    signature_and_header = 8 + 25
    head, rest = picture.getvalue()[:signature_and_header], picture.getvalue()[signature_and_header:]
    kind = b"prVt"
    chunk = struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))
    return head + chunk * _NUM_CHUNKS + rest


@cache
def marker_jpeg() -> bytes:
    """A JPEG with half a million empty application markers before its pixels."""
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "JPEG")
    return picture.getvalue()[:2] + b"\xff\xe5\x00\x02" * _NUM_CHUNKS + picture.getvalue()[2:]
