"""The log's queue: nobody waits for its reader, and what is lost is counted."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from tests.patience import PATIENCE_SECONDS
from trimserve.server import queued_log
from trimserve.server.queued_log import QueuedHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """Both ends: to read, and to write."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


class Dropped:
    """Counts."""

    num = 0

    def __call__(self, number: int) -> None:
        self.num += number


class Gone(io.StringIO):
    """A stream that is no file and cannot be written."""

    def write(self, _text: str) -> int:
        raise ValueError("I/O operation on closed file")


@pytest.fixture
def dropped() -> Dropped:
    return Dropped()


def logger_of(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def test_lines_come_in_order(pipe: tuple[int, TextIO], dropped: Dropped) -> None:
    handler = QueuedHandler(pipe[1], dropped)
    for number in range(100):
        logger_of(handler).warning("line %d ☃", number)
    assert handler.drain(PATIENCE_SECONDS)
    assert os.read(pipe[0], 2**16).decode().splitlines() == [f"line {number} ☃" for number in range(100)]
    assert dropped.num == 0


def test_a_pipe_that_nobody_reads_stops_no_one_and_what_does_not_fit_is_counted(
    pipe: tuple[int, TextIO], dropped: Dropped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued_log, "MAX_CHARS", 100_000)
    handler = QueuedHandler(pipe[1], dropped)
    logger = logger_of(handler)
    for _ in range(300):
        logger.warning("x" * 999)
    assert not handler.drain(0.05)
    assert 100 < dropped.num <= 200  # a pipe holds 64 KiB beside the queue's 100 kB
    os.set_blocking(pipe[0], True)
    num_read = 0
    while num_read < 1000 * (300 - dropped.num):
        num_read += len(os.read(pipe[0], 2**16))
    assert handler.drain(PATIENCE_SECONDS)
    logger.warning("and on")
    assert handler.drain(PATIENCE_SECONDS)
    assert os.read(pipe[0], 2**16) == b"and on\n"


def test_a_pipe_without_room_for_more_is_not_drained(pipe: tuple[int, TextIO], dropped: Dropped) -> None:
    handler = QueuedHandler(pipe[1], dropped)
    os.set_blocking(pipe[1].fileno(), False)
    os.write(pipe[1].fileno(), bytes(2**20))
    assert not handler.drain(0)


@pytest.mark.parametrize("make", [Path("/dev/full").open, lambda _mode: Gone()])
def test_lines_that_cannot_be_written_are_counted(make: Callable[[str], TextIO], dropped: Dropped) -> None:
    with make("w") as stream:
        handler = QueuedHandler(stream, dropped)
        logger_of(handler).warning("lost")
        assert handler.drain(PATIENCE_SECONDS)
    assert dropped.num == 1


def test_a_line_that_cannot_be_made_is_counted(dropped: Dropped) -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream, dropped)
    logger_of(handler).warning("%d", "not a number")
    assert handler.drain(PATIENCE_SECONDS)
    assert (dropped.num, stream.getvalue()) == (1, "")
