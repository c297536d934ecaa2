"""A PNG reduced to what its pixels and its orientation need, so that no limit on metadata refuses an image.

Pillow refuses a file whose text or colour profile unpacks to more than a MiB, and one whose metadata is damaged.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final

__all__ = ["SIGNATURE", "without_metadata"]

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_XMP: Final = b"XML:com.adobe.xmp"
_EXIF: Final = b"Raw profile type exif"  # ImageMagick's way from before there was the chunk eXIf
_MOST_TEXT: Final = 16 * 2**20
"""Bytes of one unpacked text that are looked at."""
_GREY_STEPS: Final = {b"\2\0": 85, b"\4\0": 17}
"""What Pillow multiplies grey samples of 2 and 4 bits by, by the depth and the kind of colour in the header."""
_DEEP_COLOUR: Final = b"\x10\2"
"""The same of colours of 16 bits, of which Pillow takes the upper 8."""
_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')


def without_metadata(data: bytes) -> bytes:
    """Drop the chunks of a PNG that neither its first image nor its orientation needs.

    Critical chunks and transparency stay as they are. Beside them stays what tells an orientation: EXIF, and one
    attribute of XMP. The frames of an animation are dropped; its still image stays. A colour that is transparent is
    told in the samples that Pillow makes.

    Args:
        data: begins with `SIGNATURE`; what follows the last whole chunk stays as it is.
    """
    kept, start = [SIGNATURE], len(SIGNATURE)
    for kind, begin, end in _chunks(data):
        if kind[0] & 0x20:  # a small first letter: not critical
            body = data[begin + 8 : end - 4]
            kept.append(data[start:begin])
            kept.append(_transparency_chunk(data, body) if kind == b"tRNS" else _orientation_chunk(kind, body))
            start = end
    return b"".join((*kept, data[start:]))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of every whole chunk, up to the last one of the image."""
    begin, kind = len(SIGNATURE), b""
    while kind != b"IEND" and begin + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + 12 + length
        if end > len(data):
            return
        yield kind, begin, end
        begin = end


def _transparency_chunk(data: bytes, body: bytes) -> bytes:
    """Transparency as Pillow reads it, which compares a colour with the samples that it has scaled to 8 bits."""
    header = data[24:26]
    if header in _GREY_STEPS and len(body) == 2:
        step = _GREY_STEPS[header]
        body = bytes((0, (body[1] & 255 // step) * step))
    elif header == _DEEP_COLOUR and len(body) == 6:
        body = bytes((0, body[0], 0, body[2], 0, body[4]))
    return _chunk(b"tRNS", body)


def _orientation_chunk(kind: bytes, body: bytes) -> bytes:
    """What tells the orientation in an ancillary chunk, as a chunk that Pillow reads; empty if nothing does."""
    if kind == b"eXIf":
        return _chunk(kind, body)
    keyword, _, rest = body.partition(b"\0")
    if kind == b"iTXt" and keyword == _XMP:
        # A flag and a method of compression, a language and a translated keyword, each with its end, and the text.
        *_, text = rest[2:].split(b"\0", 2)
        found = _ORIENTATION.search(_unpacked(text) if rest[:1] == b"\1" else text)
        return _chunk(kind, _XMP + bytes(5) + found[0]) if found else b""
    if kind in (b"zTXt", b"tEXt") and keyword == _EXIF:
        return _chunk(b"tEXt", _EXIF + b"\0" + (_unpacked(rest[1:]) if kind == b"zTXt" else rest))
    return b""


def _unpacked(text: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT)
    except zlib.error:
        return b""


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
