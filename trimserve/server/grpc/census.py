"""How many fields a message has, counted on the wire before any object is made of them.

Two bytes suffice for an empty message in a repeated field, and become a hundred as an object: 16 MiB of them would
take gigabytes and minutes. Counting stops at the bound, and what is not a message of its own (text, files, packed
numbers) is stepped over.
"""

from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from trimserve.errors import InvalidRequest

__all__ = ["MAX_FIELDS", "MAX_PACKED_BYTES", "check_fields"]

MAX_FIELDS = 32768
"""Of one request, on all levels: more than the largest valid one has."""

MAX_PACKED_BYTES = 8 * 2**20
"""Of the numbers of one packed field: more than any context window has."""

_MAX_VARINT_BYTES = 10

_Table = dict[int, Descriptor | None]
"""Of a message's fields that come as bytes: the type of a message, None for packed numbers."""


def check_fields(data: bytes, kind: type[Message]) -> None:
    """Check that a message is small enough, in number, to be parsed.

    Args:
        data: as it came, not compressed.
        kind: what it should be.
    Raises:
        InvalidRequest: it has too many fields or numbers, or is no message.
    """
    try:
        descriptor: Any = kind.DESCRIPTOR  # of upb, whose type is another one
        _Census().count(data, 0, len(data), descriptor)
    except IndexError:
        raise _malformed() from None


class _Census:
    """Counts the fields of one message and of those within it."""

    def __init__(self) -> None:
        self._num_fields = 0

    def count(self, data: bytes, at: int, end: int, kind: Descriptor) -> None:
        table = _table(kind)
        while at < end:
            self._num_fields += 1
            if self._num_fields > MAX_FIELDS:
                raise InvalidRequest("request", f"must have at most {MAX_FIELDS} fields in all, got more")
            tag, at = _varint(data, at)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at)
                case 1:
                    at += 8
                case 5:
                    at += 4
                case 2:
                    length, at = _varint(data, at)
                    if length > end - at:
                        raise _malformed()
                    number = tag >> 3
                    if number in table:
                        self._look_into(data, at, at + length, table[number])
                    at += length
                case _:  # groups, which proto3 does not have, and types that do not exist
                    raise _malformed()
        if at > end:
            raise _malformed()

    def _look_into(self, data: bytes, at: int, end: int, kind: Descriptor | None) -> None:
        if kind is not None:
            self.count(data, at, end, kind)
        elif end - at > MAX_PACKED_BYTES:
            raise InvalidRequest(
                "request", f"must have at most {MAX_PACKED_BYTES} bytes of numbers in a field, got {end - at}"
            )


@cache
def _table(kind: Descriptor) -> _Table:
    return {
        field.number: field.message_type
        for field in kind.fields
        if field.message_type is not None or (field.is_repeated and field.type not in _TEXT)
    }


_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; IndexError past the end."""
    byte = data[at]
    at += 1
    if byte < 128:
        return byte, at
    value = byte & 127
    for shift in range(7, 7 * _MAX_VARINT_BYTES, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _malformed()


def _malformed() -> InvalidRequest:
    return InvalidRequest("request", "must be a message of the method's type, got bytes that are none")
