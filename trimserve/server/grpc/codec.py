"""From the bytes of a message to its type, with a bound on what a compressed one inflates to.

gRPC inflates a compressed message before it looks at its size, so a few megabytes can take all memory: the
server has gRPC leave messages compressed (`transport.py`) and inflates them here, up to the bound.
"""

import zlib
from collections.abc import Callable

from google.protobuf.message import DecodeError, Message

from trimserve.errors import InvalidRequest, MessageTooLarge

__all__ = ["bounded"]

GZIP_MAGIC = b"\x1f\x8b"
"""No protobuf message begins like this: its first byte would be a tag of wire type 7, which does not exist."""

GZIP_WINDOW_BITS = 31


def bounded(parse: Callable[[bytes], Message], max_bytes: int) -> Callable[[bytes], Message]:
    """A deserializer that also takes gzip, up to a size.

    Args:
        parse: reads a message from plain bytes.
        max_bytes: largest plain message; a compressed one is inflated no further.
    Returns:
        Reads a message; raises InvalidRequest and MessageTooLarge.
    """

    def read(data: bytes) -> Message:
        plain = _inflate(data, max_bytes) if data.startswith(GZIP_MAGIC) else data
        try:
            return parse(plain)
        except DecodeError:  # its own text repeats what the client sent
            raise InvalidRequest("request", "must be a message of the method's type, got bytes that are none") from None

    return read


def _inflate(data: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(GZIP_WINDOW_BITS)
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        raise InvalidRequest("request", "must be valid gzip, got a damaged stream") from None
    if len(plain) > max_bytes:
        raise MessageTooLarge(f"the message inflates to more than {max_bytes} bytes (max_message_bytes)")
    if not inflater.eof:
        raise InvalidRequest("request", "must be valid gzip, got a stream that ends early")
    return plain
