"""The processes of the ranks beside rank 0: started, watched and ended.

One thread starts them and then waits for what they say and for their end. A process ends with that thread, whatever
ends it: that is how the kernel tells it of the end of its parent, even while it is stopped. It knows no model.
"""

import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple, TypeVar

from trimserve.errors import RankFailed

__all__ = ["RANK_MODULE", "Raised", "RankProcesses"]

log = logging.getLogger(__name__)

T = TypeVar("T")

RANK_MODULE: Final = ("-m", "trimserve.executor.rank_main")

_CAUSE_SECONDS: Final = 0.25
"""Between the end of a connection and that of the process, or until a process has said why it ends."""


class Raised(NamedTuple):
    """The last words of a rank."""

    error: str
    stack: str
    """Without the values of variables, which hold prompts."""


class RankProcesses:
    """Ranks 1 to size - 1; one thread talks to them, any thread may close."""

    def __init__(self, size: int, timeout_seconds: float, module: Sequence[str] = RANK_MODULE) -> None:
        """Start them.

        Args:
            size: ranks, this process included.
            timeout_seconds: after which a message that a rank does not take is an error.
            module: what the interpreter runs.
        Raises:
            OSError: they cannot be started.
        """
        self.connections: list[Connection] = []
        """To each rank, in order."""
        self._folder = TemporaryDirectory(prefix="trimserve-ranks-")
        self.store = Path(self._folder.name) / "store"
        """By which they meet, see `ranks.connect`; NCCL looks there later, too."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._replies: SimpleQueue[object] = SimpleQueue()
        self._failure: RankFailed | None = None
        self._has_failed = threading.Event()
        self._is_closed = False
        self._on_failure: Callable[[BaseException], None] | None = None
        self._lock = threading.Lock()
        """Of what is known of a failure."""
        is_started: Future[None] = Future()

        def run() -> None:
            """The thread: start every rank, then watch them until they end."""
            try:
                for _ in range(1, size):
                    self._start(timeout_seconds, module)
            except BaseException as error:  # noqa: BLE001  # handed to whoever waits for it
                is_started.set_exception(error)
                return
            is_started.set_result(None)
            self._watch()

        self._thread = threading.Thread(target=run, name="trimserve-ranks", daemon=True)
        self._thread.start()
        is_started.result()

    @property
    def pids(self) -> list[int]:
        """Of the processes, in order."""
        return [process.pid for process in self._processes]

    def tell(self, messages: Sequence[object]) -> None:
        """Send each rank plain data of its own."""
        for connection, message in zip(self.connections, messages, strict=True):
            connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def replies(self, kind: type[T]) -> list[T]:
        """Wait until every rank has replied, and return what they say, in order.

        Raises:
            RankFailed: one of them has ended.
        """
        found: dict[int, T] = {}
        while len(found) < len(self._processes):
            reply = self._replies.get()
            if isinstance(reply, RankFailed):
                raise reply
            assert isinstance(reply, tuple)
            rank, message = reply
            if not isinstance(message, kind):
                raise RankFailed(f"rank {rank} is not in step: expected {kind.__name__}, got {message!r}")
            found[rank] = message
        return [found[rank] for rank in sorted(found)]

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """Name who is told of the first failure, on the thread that finds it; at once if there was one."""
        with self._lock:
            self._on_failure, failure = on_failure, self._failure
        if failure is not None:
            on_failure(failure)

    def unless_one_ends(self, function: Callable[[], T]) -> T:
        """Call a function that waits for the other ranks in compiled code; when one of them ends, wait no longer.

        Raises:
            RankFailed: a rank has ended; the function may go on, in a thread of its own.
            BaseException: what the function raises.
        """
        outcome: Future[T] = Future()

        def fail(error: BaseException) -> None:
            """Make an error the outcome, if there is none yet."""
            with suppress(InvalidStateError):
                outcome.set_exception(error)

        def call() -> None:
            """The thread: whichever comes first, the result or the end of a rank, is the outcome."""
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  # handed to whoever waits for it
                fail(error)
            else:
                with suppress(InvalidStateError):
                    outcome.set_result(result)

        self.watch(fail)
        # Who may leave the caller's thread behind, which it knows by its name, may leave this one behind as well.
        threading.Thread(target=call, name=threading.current_thread().name, daemon=True).start()
        try:
            return outcome.result()
        except RankFailed as error:
            raise self.cause_of(error) from error

    def cause_of(self, error: BaseException) -> RankFailed:
        """Why the ranks fell out of step: an error of this process, or the end of another one, which follows soon."""
        if not isinstance(error, RankFailed):
            failure = RankFailed(f"rank 0 failed: {error!r}")
        else:
            self._has_failed.wait(_CAUSE_SECONDS)
            failure = self._failure or error
        failure.__cause__ = error if failure is not error else error.__cause__
        return failure

    def close(self) -> None:
        """End them, whatever they do."""
        self._is_closed = True
        for process in self._processes:
            process.kill()
        self._thread.join()
        for process, connection in zip(self._processes, self.connections, strict=True):
            process.wait()
            connection.close()
        self._folder.cleanup()

    # ---- the thread of their own ----

    def _start(self, timeout_seconds: float, module: Sequence[str]) -> None:
        """Execute a process, never fork it: nothing of this one lives on in it."""
        ours, theirs = socket.socketpair()
        seconds, rest = divmod(timeout_seconds, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", *module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a signal to the group is for its parent
            )
        self._processes.append(process)
        self.connections.append(Connection(ours.detach()))

    def _watch(self) -> None:
        """Collect replies until a rank ends; the kernel then ends the others with this thread."""
        while True:
            for connection in wait(self.connections):
                assert isinstance(connection, Connection)
                rank = self.connections.index(connection) + 1
                try:
                    message: object = pickle.loads(connection.recv_bytes())
                except Exception:  # noqa: BLE001  # it ended, or said something that is no message
                    message = None
                if message is None or isinstance(message, Raised):
                    self._fail(rank, message)
                    return
                self._replies.put((rank, message))

    def _fail(self, rank: int, raised: Raised | None) -> None:
        if self._is_closed:
            return
        if raised is not None:
            log.error("rank %d raised %s", rank, raised.error, extra={"stack": raised.stack})
        failure = RankFailed(f"rank {rank} {self._end_of(rank) if raised is None else f'failed: {raised.error}'}")
        with self._lock:
            self._failure, on_failure = failure, self._on_failure
        self._has_failed.set()
        self._replies.put(failure)
        if on_failure is not None:
            on_failure(failure)

    def _end_of(self, rank: int) -> str:
        process = self._processes[rank - 1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(_CAUSE_SECONDS)
        if process.returncode is None:
            return "closed its connection"
        if process.returncode < 0:
            return f"was ended by {signal.Signals(-process.returncode).name}"
        return f"ended with status {process.returncode}"
