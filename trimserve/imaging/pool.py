"""Processes that decode image files: a bad file ends one of them, and another takes its place.

It knows nothing of requests and of their order: who decodes how many files at once is the caller's business.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from trimserve.errors import EngineBusy, EngineStopped, InvalidRequest
from trimserve.imaging.decode import Pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.process import DecoderProcess, ProcessEnded

__all__ = ["CAUSES", "DecoderPool"]

log = logging.getLogger(__name__)

CAUSES: Final = ("processor_time", "wall_clock", "crash")
"""Why a process ended with a file in hand."""

_ATTEMPTS: Final = 2
"""A crash may be an accident: the kernel was short of memory. Two are the file's fault."""
_RETRY_SECONDS: Final = 1.0
"""Between two attempts to start a process."""


class DecoderPool:
    """Keeps a number of processes running. Thread-safe."""

    def __init__(self, size: int, limits: Limits, start: Callable[[Limits], DecoderProcess] = DecoderProcess) -> None:
        """Start nothing yet.

        Args:
            size: processes, at least 1.
            limits: of each file.
            start: makes a process.
        """
        self._limits = limits
        self._start = start
        self._changed = threading.Condition()  # its lock can be taken again by whoever has it
        self._num_wanted = size
        """Processes that are still to be started."""
        self._processes: set[DecoderProcess] = set()
        self._idle: list[DecoderProcess] = []
        self._failure: Exception | None = None
        """Why the last start failed; None once one succeeds."""
        self._is_closed = False
        self._deaths = Counter(dict.fromkeys(CAUSES, 0))
        # Processes end with the thread that started them, so one thread starts them all.
        self._starter = threading.Thread(target=self._keep_started, name="trimserve-decoders", daemon=True)

    @property
    def is_able(self) -> bool:
        """False while processes cannot be started, or once the pool is closed."""
        return self._failure is None and not self._is_closed

    @property
    def deaths(self) -> Mapping[str, int]:
        """Processes that ended with a file in hand, by cause."""
        return self._deaths

    def start(self) -> None:
        """Begin to start the processes; returns at once."""
        self._starter.start()

    @contextmanager
    def decode(self, data: bytes, field: str) -> Iterator[Pixels]:
        """Decode a file in a process; waits for one that is idle. See `decode_pixels`.

        Yields:
            the pixels, in memory that the process uses again once the block is left.
        Raises:
            InvalidRequest: the file cannot be decoded, takes more time or memory than its pixels warrant, or
                crashes its process twice.
            EngineBusy: no process can be started, or none answers: no fault of the file.
            EngineStopped: the pool was closed.
        """
        process, pixels = self._decode(data, field)
        try:
            yield pixels
        finally:
            self._give_back(process)

    def close(self) -> None:
        """End all processes; who waits for one gets EngineStopped."""
        with self._changed:
            self._is_closed = True
            for process in self._processes:
                process.kill()
            for process in self._idle:  # the others are closed by whoever has them
                process.close()
            self._idle.clear()
            self._changed.notify_all()
        if self._starter.ident is not None:
            self._starter.join()

    def _decode(self, data: bytes, field: str) -> tuple[DecoderProcess, Pixels]:
        for _ in range(_ATTEMPTS):
            process = self._take()
            try:
                return process, process.decode(data, field)
            except ProcessEnded as ended:
                self._lose(process, ended.cause)
                if ended.cause == "processor_time":
                    raise InvalidRequest(field, self._too_slow()) from None
                if ended.cause == "wall_clock":
                    waited = f"{self._limits.wall_seconds:g} s"
                    raise EngineBusy(f"an image was not decoded within {waited}: the machine is busy") from None
            except InvalidRequest:
                self._give_back(process)
                raise
            except BaseException:  # its answer may still come: it must not be taken for the next file's
                process.close()
                self._lose(process, "crash")
                raise
        raise InvalidRequest(field, f"must be an image that can be decoded: the decoder crashed {_ATTEMPTS} times")

    def _too_slow(self) -> str:
        limits = self._limits
        base, rate = f"{limits.cpu_seconds:g} s", f"{limits.cpu_seconds_per_megapixel:g} s"
        return f"must decode within {base} of processor time and {rate} for each megapixel, got more"

    def _take(self) -> DecoderProcess:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._failure or self._is_closed)
            if self._is_closed:
                raise EngineStopped("the engine is stopping")
            if self._idle:
                return self._idle.pop()
            raise EngineBusy("images cannot be decoded now: no process can be started")

    def _give_back(self, process: DecoderProcess) -> None:
        with self._changed:
            if self._is_closed:
                process.close()
            else:
                self._idle.append(process)
                self._changed.notify_all()

    def _lose(self, process: DecoderProcess, cause: str) -> None:
        with self._changed:
            self._processes.discard(process)
            if self._is_closed:
                raise EngineStopped("the engine is stopping") from None
            self._deaths[cause] += 1
            self._num_wanted += 1
            self._changed.notify_all()
        log.warning("a process that decoded an image has ended", extra={"cause": cause})

    # ---- the starter's thread ----

    def _keep_started(self) -> None:
        while self._is_any_wanted():
            try:
                process = self._start(self._limits)
            except Exception as error:  # tried again until it succeeds
                log.exception("a process that decodes images cannot be started")
                self._started(None, error)
            else:
                self._started(process, None)

    def _is_any_wanted(self) -> bool:
        """Wait until a process is to be started; False once the pool is closed."""
        with self._changed:
            if self._failure is not None:
                self._changed.wait_for(lambda: self._is_closed, _RETRY_SECONDS)
            self._changed.wait_for(lambda: self._num_wanted or self._is_closed)
            return not self._is_closed

    def _started(self, process: DecoderProcess | None, failure: Exception | None) -> None:
        with self._changed:
            self._failure = failure
            if process is not None:
                self._num_wanted -= 1
                self._processes.add(process)
                self._give_back(process)
            self._changed.notify_all()
