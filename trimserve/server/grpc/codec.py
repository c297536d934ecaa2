"""From the bytes of a message to its type, with a bound on what a compressed one inflates to and on its parts.

gRPC inflates a compressed message before it looks at its size, so a few megabytes can take all memory: the
server has gRPC leave messages compressed (`transport.py`) and inflates them here, up to the bound.
"""

import zlib
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from trimserve.errors import InvalidRequest, MessageTooLarge
from trimserve.server.grpc.census import check_fields

__all__ = ["SMALL_BYTES", "Codec", "is_small"]

GZIP_MAGIC = b"\x1f\x8b"
"""No protobuf message begins like this: its first byte would be a tag of wire type 7, which does not exist."""

GZIP_WINDOW_BITS = 31

SMALL_BYTES = 8 * 2**10
"""A message that is larger, or compressed, is not read on the event loop."""

M = TypeVar("M", bound=Message)


class Codec(Generic[M]):
    """Reads messages of one type, plain or gzip, up to a size."""

    def __init__(self, kind: type[M], max_bytes: int, bound: str = "max_message_bytes") -> None:
        """Read nothing yet.

        Args:
            kind: of the messages.
            max_bytes: largest plain message; a compressed one is inflated no further.
            bound: name of `max_bytes` in errors.
        """
        self._kind = kind
        self._max_bytes = max_bytes
        self._bound = bound

    def read(self, data: bytes) -> M:
        """A message.

        Args:
            data: as it came.
        Raises:
            InvalidRequest: it is none, or has too many parts.
            MessageTooLarge: it is, or inflates to, more bytes than it may have.
        """
        plain = self._inflated(data) if data.startswith(GZIP_MAGIC) else data
        if len(plain) > self._max_bytes:
            raise MessageTooLarge(f"the message has {len(plain)} bytes, {self._max_bytes} are allowed ({self._bound})")
        check_fields(plain, self._kind)
        try:
            return self._kind.FromString(plain)
        except DecodeError:  # its own text repeats what the client sent
            raise InvalidRequest("request", "must be a message of the method's type, got bytes that are none") from None

    def _inflated(self, data: bytes) -> bytes:
        inflater = zlib.decompressobj(GZIP_WINDOW_BITS)
        try:
            plain = inflater.decompress(data, self._max_bytes + 1)
        except zlib.error:
            raise InvalidRequest("request", "must be valid gzip, got a damaged stream") from None
        if len(plain) > self._max_bytes:
            raise MessageTooLarge(f"the message inflates to more than {self._max_bytes} bytes ({self._bound})")
        if not inflater.eof:
            raise InvalidRequest("request", "must be valid gzip, got a stream that ends early")
        return plain


def is_small(data: bytes) -> bool:
    """Whether reading a message takes so little that the event loop may do it itself."""
    return len(data) <= SMALL_BYTES and not data.startswith(GZIP_MAGIC)
