"""A process that decodes image files, one after the other, and that any of them may end.

    python -m trimserve.imaging.worker DESCRIPTOR PARENT LIMITS

Files come and pixels go as memory files over the connected socket DESCRIPTOR; LIMITS is JSON. A file that takes more
processor time than its limit ends the process by SIGPROF: nothing else interrupts a decoder. It imports neither torch
nor anything else that takes long to load.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimserve.errors import InvalidRequest
from trimserve.imaging.decode import ImageReader
from trimserve.imaging.limits import Limits
from trimserve.imaging.memory import kept_memory, new_memory, write_memory
from trimserve.imaging.messages import receive, send
from trimserve.parent import end_with_parent

__all__ = ["main"]

_MOST_CHARACTERS = 1000  # of an error: some quote the file
_MOST_DESCRIPTORS = 32


def main() -> None:
    """Serve until the other side closes the connection."""
    descriptor, parent, limits = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    worker = _Worker(connection, Limits(**json.loads(limits)))
    _become_expendable(int(parent), worker.limits)
    with suppress(ConnectionError):
        send(connection, {"is_ready": True})
        while (received := receive(connection)) is not None:
            _, file = received
            assert file is not None
            with open(file, "rb") as content:
                data = content.read()
            worker.decode(data)


def _become_expendable(parent: int, limits: Limits) -> None:
    """End with the parent, within limits; leave output to it, too."""
    end_with_parent(parent)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MOST_DESCRIPTORS),
        (resource.RLIMIT_FSIZE, 3 * limits.max_pixels),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most, hard) if hard == resource.RLIM_INFINITY else (min(most, hard), hard))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C complain there; whatever is worth it is answered


class _Worker:
    """Decodes one file at a time within its limits."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._connection = connection
        self._memory = new_memory()
        self.limits = limits

    def decode(self, data: bytes) -> None:
        """Answer with the pixels of a file, which last until the next one, or with why there are none."""
        shape = [0, 0, 3]
        try:
            write_memory(self._memory, self._bands(data, shape))
        except InvalidRequest as error:
            self._answer({"error": error.message[:_MOST_CHARACTERS]})
        except MemoryError:
            self._answer({"error": f"must decode within {self.limits.bytes_per_pixel} bytes for each pixel"})
        else:
            self._answer({"shape": shape}, self._memory)
        self._memory = kept_memory(self._memory)

    def _answer(self, message: dict[str, Any], pixels: int | None = None) -> None:
        self._lift_limits()
        send(self._connection, message, pixels)

    def _bands(self, data: bytes, shape: list[int]) -> Iterator[memoryview]:
        """Bands of the image in a file, under limits; their common shape is told as they come."""
        base = _address_space()
        self._limit(0, base + self.limits.memory(self.limits.max_pixels, len(data)))
        reader = ImageReader(data, "", self.limits.max_pixels)
        self._limit(reader.num_pixels, base + self.limits.memory(reader.num_pixels, len(data)))
        for band in reader.bands():
            shape[0] += band.shape[0]
            shape[1] = band.shape[1]
            yield band.data

    def _limit(self, num_pixels: int, address_space: int) -> None:
        """Limit what comes next. A timer and not RLIMIT_CPU, which counts whole seconds of the whole process."""
        signal.setitimer(signal.ITIMER_PROF, self.limits.cpu(num_pixels))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = address_space if hard == resource.RLIM_INFINITY else min(address_space, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))

    def _lift_limits(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
