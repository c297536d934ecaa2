"""HTTP/2 as misbehaving clients speak it: headers and data of one's own making, sent frame by frame.

gRPC's own clients send only what is well-formed and complete. This one sends what it is told to, as far as the server's
flow control lets it, and answers nothing but settings and pings. Answers are looked at as bytes: HPACK is not decoded,
which suffices for the first answer on a connection, since gRPC sends its headers as plain literals.
"""

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

__all__ = ["RawConnection", "framed"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4
_INITIAL_WINDOW_BYTES = 65535
_FRAME_BYTES = 16384

_USUAL_HEADERS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def framed(message: bytes, *, announced: int | None = None, is_compressed: bool = False) -> bytes:
    """A message with gRPC's prefix.

    Args:
        message: what follows the prefix.
        announced: length that the prefix claims; None is the true one.
        is_compressed: flag of the prefix.
    """
    length = len(message) if announced is None else announced
    return bytes([is_compressed]) + length.to_bytes(4, "big") + message


class RawConnection:
    """A connection to a server's plaintext port; an async context manager."""

    def __init__(self, address: str) -> None:
        """Connect to nothing yet.

        Args:
            address: `HOST:PORT`.
        """
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._next_stream = 1
        self._initial_window = _INITIAL_WINDOW_BYTES
        self._windows: defaultdict[int, int] = defaultdict(lambda: self._initial_window)
        self._windows[0] = _INITIAL_WINDOW_BYTES
        self._changed = asyncio.Event()
        self._answers: defaultdict[int, bytes] = defaultdict(bytes)
        self._ended: set[int] = set()
        self.num_sent = 0
        """Bytes of data, of all calls."""
        self.is_closed = False
        """Whether the server closed it."""

    async def __aenter__(self) -> "RawConnection":
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(_PREFACE + _frame(_SETTINGS, 0, 0))
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.cancel()
        with suppress(asyncio.CancelledError):
            await self._listener
        self._writer.transport.abort()
        await asyncio.sleep(0)  # a transport lets go of its socket in the loop's next round

    def call(self, method: str, headers: Sequence[tuple[str, str]] = ()) -> int:
        """Begin a call; returns its stream's number.

        Args:
            method: path, such as `/grpc.health.v1.Health/Check`.
            headers: beside the usual ones.
        """
        block = b"".join(_literal(name, value) for name, value in ((":path", method), *_USUAL_HEADERS, *headers))
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._write(_frame(_HEADERS, _END_HEADERS, stream, block))
        return stream

    async def send(self, stream: int, data: bytes, *, is_last: bool = False) -> int:
        """Send data as far as the server takes it; returns how many bytes were sent before the call ended.

        Args:
            stream: of the call.
            data: split into frames.
            is_last: whether nothing follows.
        """
        sent = 0
        while sent < len(data) and stream not in self._ended and not self.is_closed:
            room = min(self.room(stream), _FRAME_BYTES)
            if room <= 0:
                await self._change()
                continue
            piece = data[sent : sent + room]
            sent += len(piece)
            self.num_sent += len(piece)
            self._windows[0] -= len(piece)
            self._windows[stream] -= len(piece)
            self._write(_frame(_DATA, _END_STREAM if is_last and sent == len(data) else 0, stream, piece))
            with suppress(ConnectionError):
                await self._writer.drain()
        if is_last and not data:
            self._write(_frame(_DATA, _END_STREAM, stream))
        return sent

    def room(self, stream: int) -> int:
        """Bytes that the server would take now."""
        return max(0, min(self._windows[0], self._windows[stream]))

    async def status(self, stream: int) -> int | None:
        """Wait for the end of a call; its gRPC status, or None if it was cut off."""
        while stream not in self._ended and not self.is_closed:
            await self._change()
        found = re.search(rb"grpc-status.(\d+)", self._answers[stream], re.DOTALL)
        return None if found is None else int(found[1])

    def _write(self, frame: bytes) -> None:
        if not self.is_closed and not self._writer.is_closing():
            self._writer.write(frame)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _listen(self) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._hear(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                self._changed.set()
        self.is_closed = True
        self._changed.set()

    def _hear(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        match kind:
            case 4 if not flags & _ACK:
                for at in range(0, len(payload), 6):
                    if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                        self._resize(int.from_bytes(payload[at + 2 : at + 6], "big"))
                self._write(_frame(_SETTINGS, _ACK, 0))
            case 6 if not flags & _ACK:
                self._write(_frame(_PING, _ACK, 0, payload))
            case 8:
                self._windows[stream] += int.from_bytes(payload, "big")
            case 0 | 1:
                self._answers[stream] += payload
                if flags & _END_STREAM:
                    self._ended.add(stream)
            case 3:
                self._ended.add(stream)

    def _resize(self, initial: int) -> None:
        for stream in self._windows.keys() - {0}:
            self._windows[stream] += initial - self._initial_window
        self._initial_window = initial


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: str, value: str) -> bytes:
    """A header that no table remembers, without Huffman's code."""
    return b"\x10" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    data, length = text.encode(), len(text.encode())
    if length < 127:
        return bytes([length]) + data
    prefix, rest = b"\x7f", length - 127
    while rest >= 128:
        prefix, rest = prefix + bytes([rest % 128 + 128]), rest // 128
    return prefix + bytes([rest]) + data
