"""Processes that decode: who waits, what takes the place of one that ended, and whose fault it was."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest
from PIL import Image

from tests.imaging.files import empty_scans
from tests.imaging.kinds import encode, photograph
from tests.patience import PATIENCE_SECONDS
from trimserve.errors import EngineBusy, EngineStopped, InvalidRequest
from trimserve.imaging import pool as pools
from trimserve.imaging.decode import Pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.pool import CAUSES, DecoderPool
from trimserve.imaging.process import DecoderProcess, ProcessEnded

LIMITS = Limits(max_pixels=1_000_000)
PIXELS = np.zeros((1, 1, 3), np.uint8)


class FakeProcess:
    """Decodes as it is told; `data` names what happens."""

    def __init__(self, outcomes: dict[bytes, Callable[[], Pixels]]) -> None:
        """Running."""
        self._outcomes = outcomes
        self.is_closed = False
        self.was_killed = threading.Event()

    def decode(self, data: bytes, _: str) -> Pixels:
        if data == b"hangs":
            assert self.was_killed.wait(PATIENCE_SECONDS)
            raise ProcessEnded("crash")
        return self._outcomes.get(data, lambda: PIXELS)()

    def kill(self) -> None:
        self.was_killed.set()

    def close(self) -> None:
        self.is_closed = True


def decoded(pool: DecoderPool, data: bytes, field: str = "image") -> Pixels:
    """The pixels of a file, copied."""
    with pool.decode(data, field) as pixels:
        return pixels.copy()


def ends(*causes: str) -> Callable[[], Pixels]:
    """Ends so many processes, by these causes, then decodes."""
    remaining = list(causes)

    def decode() -> Pixels:
        if remaining:
            raise ProcessEnded(remaining.pop(0))
        return PIXELS

    return decode


@contextmanager
def running(
    outcomes: dict[bytes, Callable[[], Pixels]] | None = None, size: int = 1, failures: int = 0
) -> Iterator[tuple[DecoderPool, list[FakeProcess]]]:
    """A pool of fakes, and those it has started; the first starts may fail."""
    started: list[FakeProcess] = []
    remaining = [OSError("no more processes")] * failures

    def start(limits: Limits) -> DecoderProcess:
        assert limits is LIMITS
        if remaining:
            raise remaining.pop()
        started.append(FakeProcess(outcomes or {}))
        return cast(DecoderProcess, started[-1])

    pool = DecoderPool(size, LIMITS, start)
    pool.start()
    try:
        yield pool, started
    finally:
        pool.close()


def test_one_process_serves_many_files() -> None:
    with running() as (pool, started):
        assert all(np.array_equal(decoded(pool, b"fine"), PIXELS) for _ in range(5))
        assert len(started) == 1
    assert started[0].is_closed


def test_a_process_decodes_no_other_file_while_its_pixels_are_read() -> None:
    with running() as (pool, _), ThreadPoolExecutor(1) as threads:
        with pool.decode(b"fine", "image"):
            other = threads.submit(decoded, pool, b"fine")
            assert not pool._idle
            assert not other.done()
        other.result(PATIENCE_SECONDS)
        with pytest.raises(RuntimeError), pool.decode(b"fine", "image"):
            raise RuntimeError("while pixels are read")
        assert np.array_equal(decoded(pool, b"fine"), PIXELS)


def test_a_file_is_tried_again_in_another_process_once() -> None:
    with running({b"unlucky": ends("crash"), b"bad": ends("crash", "crash", "crash")}) as (pool, started):
        assert np.array_equal(decoded(pool, b"unlucky"), PIXELS)
        assert len(started) == 2
        with pytest.raises(InvalidRequest, match=r"^images\[1\]: .* the decoder crashed 2 times$"):
            decoded(pool, b"bad", "images[1]")
        assert np.array_equal(decoded(pool, b"fine"), PIXELS)
        assert pool.deaths == {"processor_time": 0, "wall_clock": 0, "crash": 3}


def test_a_file_that_takes_too_long_costs_one_process() -> None:
    with running({b"slow": ends("processor_time")}) as (pool, started):
        with pytest.raises(InvalidRequest, match=r"image: must decode within 1 s .* 0.25 s for each megapixel"):
            decoded(pool, b"slow")
        assert np.array_equal(decoded(pool, b"slow"), PIXELS)
        assert len(started) == 2
        assert pool.deaths["processor_time"] == 1


def test_a_machine_that_is_too_busy_is_no_fault_of_the_file() -> None:
    with running({b"starved": ends("wall_clock")}) as (pool, _):
        with pytest.raises(EngineBusy, match="not decoded within 5 s"):
            decoded(pool, b"starved")
        assert pool.deaths["wall_clock"] == 1


def test_a_refusal_keeps_the_process() -> None:
    def refuse() -> Pixels:
        raise InvalidRequest("image", "must be nicer")

    with running({b"refused": refuse}) as (pool, started):
        with pytest.raises(InvalidRequest, match="nicer"):
            decoded(pool, b"refused")
        assert np.array_equal(decoded(pool, b"fine"), PIXELS)
        assert len(started) == 1
        assert not any(pool.deaths.values())


def test_an_answer_that_was_not_waited_for_is_nobody_elses() -> None:
    def interrupt() -> Pixels:
        raise MemoryError

    with running({b"interrupted": interrupt}) as (pool, started):
        with pytest.raises(MemoryError):
            decoded(pool, b"interrupted")
        assert np.array_equal(decoded(pool, b"fine"), PIXELS)
        assert started[0].is_closed
        assert len(started) == 2


def test_processes_that_cannot_be_started_are_no_fault_of_the_file_and_are_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "_RETRY_SECONDS", PATIENCE_SECONDS)
    with running(failures=1) as (pool, _):
        with pytest.raises(EngineBusy, match="no process can be started"):
            decoded(pool, b"fine")
        assert not pool.is_able
    monkeypatch.setattr(pools, "_RETRY_SECONDS", 0)
    with running(failures=3) as (pool, started):
        with pool._changed:
            assert pool._changed.wait_for(lambda: started, PATIENCE_SECONDS)
        assert np.array_equal(decoded(pool, b"fine"), PIXELS)
        assert pool.is_able


def test_closing_ends_what_is_being_decoded_and_refuses_the_rest() -> None:
    with running() as (pool, started), ThreadPoolExecutor(2) as threads:
        files = [threads.submit(decoded, pool, b"hangs") for _ in range(2)]  # one waits for the other's process
        with pool._changed:
            assert pool._changed.wait_for(lambda: started and not pool._idle, PATIENCE_SECONDS)
        pool.close()
        for file in files:
            with pytest.raises(EngineStopped):
                file.result(PATIENCE_SECONDS)
        with pytest.raises(EngineStopped):
            decoded(pool, b"fine")
        assert len(started) == 1


def test_a_bad_file_costs_its_sender_an_error_and_the_others_nothing() -> None:
    limits = Limits(1_000_000, cpu_seconds=0.1, cpu_seconds_per_megapixel=0.1, wall_ratio=400)
    pool = DecoderPool(2, limits)
    pool.start()
    photo = encode(Image.fromarray(photograph()), "JPEG")
    expected = decoded(pool, photo)
    bad = empty_scans(200_000)
    with ThreadPoolExecutor(8) as threads:
        files = [bad if number % 4 == 0 else photo for number in range(16)]
        futures = [threads.submit(decoded, pool, file, f"images[{number}]") for number, file in enumerate(files)]
        for number, future in enumerate(futures):
            if number % 4 == 0:
                with pytest.raises(InvalidRequest, match=rf"images\[{number}\]: must decode within"):
                    future.result(PATIENCE_SECONDS)
            else:
                assert np.array_equal(future.result(PATIENCE_SECONDS), expected)
    assert pool.deaths == {**dict.fromkeys(CAUSES, 0), "processor_time": 4}
    pool.close()
