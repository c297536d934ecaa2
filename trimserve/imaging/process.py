"""The parent's side of one process that decodes image files."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from trimserve.errors import InvalidRequest
from trimserve.imaging.decode import Pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.memory import new_memory, received_pixels, write_memory
from trimserve.imaging.messages import receive, send

__all__ = ["DecoderProcess", "ProcessEnded"]

_START_SECONDS = 60.0
"""For a process to begin, on a machine that is busy."""
_LAST_SECONDS = 1.0
"""Between the end of a process's connection and its own."""
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc keeps the memory of one photograph for the next: to fetch it anew takes longer than to decode it.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
_INHERITED: Final = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""What an interpreter may need to begin; nothing else of the environment is told."""


class ProcessEnded(Exception):
    """The process is gone, and the file that it had is not decoded."""

    def __init__(self, cause: str) -> None:
        """Name the cause.

        Args:
            cause: `processor_time` and `wall_clock` are limits of a file, `crash` is everything else.
        """
        super().__init__(cause)
        self.cause = cause


class DecoderProcess:
    """One process; used by one thread at a time, but for `kill`.

    It ends with the thread that started it, too: that is how the kernel tells it of the end of its parent.
    """

    def __init__(self, limits: Limits, module: Sequence[str] = ("-m", "trimserve.imaging.worker")) -> None:
        """Start it, and wait until it is ready. It is executed, never forked: nothing of this process lives on in it.

        Args:
            limits: of each file.
            module: what the interpreter runs.
        Raises:
            OSError: it cannot be started, or ends at once.
        """
        self._limits = limits
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = (str(theirs.fileno()), str(os.getpid()), json.dumps(asdict(limits)))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", *module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
                # A signal to the group is for its parent. Not a session of its own: where the kernel shares processor
                # time between sessions, each would count as much as the whole server.
                process_group=0,
            )
        try:
            self._receive(_START_SECONDS)
        except ProcessEnded as error:
            raise OSError(f"a process that decodes images did not start: {error.cause}") from error

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def decode(self, data: bytes, field: str) -> Pixels:
        """Decode a file; see `decode_pixels`.

        Returns:
            pixels that are read from the process's memory: the next call overwrites them.
        Raises:
            InvalidRequest: the file cannot be decoded.
            ProcessEnded: the process ended while it decoded.
        """
        memory = new_memory()
        try:
            write_memory(memory, [data])
            send(self._connection, {}, memory)
        except OSError:  # it ended meanwhile
            raise self._ended("crash") from None
        finally:
            os.close(memory)
        answer, pixels = self._receive(self._limits.wall_seconds)
        error = answer.get("error")
        if error is not None:
            if pixels is not None:
                os.close(pixels)
            raise InvalidRequest(field, str(error))
        try:
            height, width, channels = map(int, answer["shape"])
            if pixels is None or channels != 3 or height * width > self._limits.max_pixels:
                raise ValueError("no pixels, or too many")
            return received_pixels(pixels, (height, width, channels))
        except (KeyError, TypeError, ValueError, OverflowError):  # whatever a file made of it
            raise self._ended("crash") from None

    def kill(self) -> None:
        """End it now, from any thread; who waits for it sees it end."""
        self._process.kill()

    def close(self) -> None:
        """End it and wait for that."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _receive(self, seconds: float) -> tuple[dict[str, Any], int | None]:
        self._connection.settimeout(seconds)
        try:
            received = receive(self._connection)
        except TimeoutError:
            raise self._ended("wall_clock") from None
        except ValueError:
            raise self._ended("crash") from None
        if received is None:
            raise self._ended("crash")
        return received

    def _ended(self, cause: str) -> ProcessEnded:
        # One that has gone by itself is not killed any more, and tells by which signal.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if cause == "wall_clock" else _LAST_SECONDS)
        self.close()
        return ProcessEnded("processor_time" if self._process.returncode == -signal.SIGPROF else cause)


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**inherited, **_ENVIRONMENT, "PYTHONPATH": path}
