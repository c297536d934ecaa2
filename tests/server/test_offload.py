"""Work for large messages, beside the event loop."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.patience import soon
from trimserve.server import offload
from trimserve.server.offload import Offload


@pytest.fixture
def trimmed() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def beside(trimmed: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offload]:
    monkeypatch.setattr(offload, "TRIM_SECONDS", 0.01)
    made = Offload(trimmed.release)
    yield made
    made.close()


async def test_work_runs_on_one_thread_of_its_own(beside: Offload) -> None:
    threads = await soon(asyncio.gather(*(beside.run(threading.get_ident) for _ in range(3))))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_memory_is_given_back_once_for_all_that_ended_meanwhile(
    beside: Offload, trimmed: threading.Semaphore
) -> None:
    beside.trim_soon()
    beside.trim_soon()
    assert await soon(asyncio.to_thread(trimmed.acquire))
    beside.trim_soon()
    assert await soon(asyncio.to_thread(trimmed.acquire))
    assert not trimmed.acquire(blocking=False)


async def test_python_and_the_c_library_give_back_what_they_can() -> None:
    made = Offload()
    await made.run(made._trim)
    made.close()
