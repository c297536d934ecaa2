"""Programs in processes of their own that start at once: forked from one that has imported what takes long.

A test that kills a process, or lets one hang, would otherwise pay for the import of torch and transformers each time.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from typing import IO, Any

__all__ = ["Program", "forked"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forked", "tests.engine.driving", "tests.server.fakes", "trimserve.cli"])


class _Descriptor:
    """An open file that goes to the new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


class Program:
    """A program that runs, with what tests need of `subprocess.Popen`."""

    def __init__(self, text: str, arguments: tuple[str, ...], stderr: int | IO[str] | None) -> None:
        """Start it; see `forked`."""
        self.stdout, output = _pipe()
        self.stderr: IO[str] | None
        self.stderr, errors = _pipe() if stderr == subprocess.PIPE else (None, _descriptor(stderr))
        self._process = _CONTEXT.Process(
            target=_run, args=(text, arguments, dict(os.environ), _Descriptor(output), _Descriptor(errors))
        )
        self._process.start()
        os.close(output)
        if errors != 2:
            os.close(errors)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = 60) -> int:
        """The return code, once it has ended."""
        self._process.join(seconds)
        if self.returncode is None:
            raise TimeoutError(f"the process did not end within {seconds:g} s")
        return self.returncode

    def rest(self) -> str:
        """What it still writes to standard error until it ends."""
        assert self.stderr is not None
        text = self.stderr.read()
        self.wait()
        return text


@contextmanager
def forked(text: str, *arguments: object, stderr: int | IO[str] | None = None) -> Iterator[Program]:
    """Run a program as `python -c` does; it is killed at the end of the block.

    Args:
        text: Python source.
        arguments: follow the program's name in `sys.argv`.
        stderr: as for `subprocess.Popen`.
    """
    program = Program(text, tuple(map(str, arguments)), stderr)
    try:
        yield program
    finally:
        program.kill()
        program.wait()
        for stream in (program.stdout, program.stderr):
            if stream is not None:
                stream.close()


def _pipe() -> tuple[IO[str], int]:
    reader, writer = os.pipe()
    return open(reader), writer


def _descriptor(stderr: int | IO[str] | None) -> int:
    if stderr == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY)
    return 2 if stderr is None or isinstance(stderr, int) else os.dup(stderr.fileno())


def _run(
    text: str, arguments: tuple[str, ...], environment: dict[str, str], output: _Descriptor, errors: _Descriptor
) -> None:
    for descriptor, number in ((output, 1), (errors, 2)):
        os.dup2(descriptor.number, number)
        if descriptor.number != number:
            os.close(descriptor.number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - its own
    # As in a terminal, though the tests may run in the background or under nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})
