"""The life of a runner: starting, warming up, stopping, dying."""

import asyncio
import threading
import time

import pytest

from tests.engine.driving import LONG, Gate, collect, held_bytes, make_runner, running
from tests.engine.fake_model import KILLS_THE_ENGINE, FakeModel, request
from tests.engine.stepping import text
from tests.patience import PATIENCE_SECONDS, until
from trimserve.api.chunks import Finished, TokenDelta
from trimserve.config import EngineConfig
from trimserve.engine.runner import Runner
from trimserve.errors import CheckpointError, EngineStopped, RequestFailed
from trimserve.executor.local import LocalExecutor
from trimserve.imaging import pool as pools
from trimserve.imaging.limits import Limits
from trimserve.imaging.pool import CAUSES, DecoderPool
from trimserve.imaging.process import DecoderProcess


def _engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trimserve-engine"]


async def test_a_runner_that_has_not_started_refuses() -> None:
    runner = make_runner(FakeModel, max_batch=1, max_queue=1, num_preprocess_workers=1)
    assert not runner.status().is_ready
    assert runner.status().uptime_seconds == 0
    with pytest.raises(EngineStopped, match="has not started"):
        await collect(runner, request("hi"))
    with pytest.raises(EngineStopped):
        _ = runner.info
    await runner.stop(0.0)


async def test_start_raises_what_loading_failed_with() -> None:
    def load() -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    runner = make_runner(load, max_batch=1, max_queue=1, num_preprocess_workers=1)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        await runner.start()
    assert not runner.status().is_ready


async def test_start_raises_what_the_warm_up_failed_with() -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    runner = make_runner(lambda: FakeModel(before_prefill=fail), max_batch=1, max_queue=1, num_preprocess_workers=1)
    with pytest.raises(RequestFailed, match="warm-up"):
        await runner.start()
    assert not runner.status().is_ready
    assert not _engine_threads()


async def test_the_smallest_context_that_holds_an_image_and_an_answer_is_served() -> None:
    async with running(FakeModel(max_model_len=2)) as runner:
        assert text(await collect(runner, request("a")))
    with pytest.raises(CheckpointError, match=r"max_model_len must be at least 2, .* got 1"):
        async with running(FakeModel(max_model_len=1)):
            pass
    assert not _engine_threads()


async def test_requests_are_refused_until_warm() -> None:
    gate = Gate()
    gate.close()
    runner = make_runner(lambda: FakeModel(before_prefill=gate), max_batch=1, max_queue=1, num_preprocess_workers=1)
    task = asyncio.create_task(runner.start())
    await until(lambda: bool(_engine_threads()))
    with pytest.raises(EngineStopped, match="is starting"):
        await collect(runner, request("hi"))
    assert not runner.status().is_ready
    gate.open()
    await task
    assert runner.status().is_ready
    await runner.stop(0.0)


async def test_a_runner_is_ready_while_images_can_be_decoded_and_ends_the_decoders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "_RETRY_SECONDS", 0.01)
    can_start = threading.Event()

    def start(limits: Limits) -> DecoderProcess:
        if not can_start.is_set():
            raise OSError("no more processes")
        return DecoderProcess(limits)

    pool = DecoderPool(1, Limits(1000), start)
    model = FakeModel()
    runner = Runner(lambda: (model, LocalExecutor(model)), EngineConfig(max_batch=1), pool)
    await runner.start()
    await until(lambda: not runner.status().is_ready)
    can_start.set()
    await until(lambda: runner.status().is_ready)
    assert runner.status().decoder_deaths == dict.fromkeys(CAUSES, 0)
    await runner.stop(0.0)
    assert not pool.is_able


async def test_an_executor_that_is_loaded_when_nobody_waits_any_more_is_closed() -> None:
    is_loading, may_load, is_closed = threading.Event(), threading.Event(), threading.Event()

    class Closing(LocalExecutor):
        def close(self) -> None:
            is_closed.set()

    def load() -> tuple[FakeModel, LocalExecutor]:
        is_loading.set()
        may_load.wait(PATIENCE_SECONDS)
        model = FakeModel()
        return model, Closing(model)

    runner = Runner(load, EngineConfig(max_batch=1))
    starting = asyncio.create_task(runner.start())
    await until(is_loading.is_set)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    may_load.set()
    await until(is_closed.is_set)


async def test_a_runner_stopped_while_it_warms_up_never_becomes_ready() -> None:
    gate = Gate()
    gate.close()
    runner = make_runner(lambda: FakeModel(before_prefill=gate), max_batch=1, max_queue=1, num_preprocess_workers=1)
    starting = asyncio.create_task(runner.start())
    await until(lambda: bool(_engine_threads()))
    stopping = asyncio.create_task(runner.stop(PATIENCE_SECONDS))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(EngineStopped, match="while it warmed up"):
        await starting
    await stopping
    assert not runner.status().is_ready
    assert not _engine_threads()


async def test_stop_lets_accepted_requests_finish_and_refuses_new_ones() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate), max_batch=1) as runner:
        gate.close()  # still runs when it is told to stop
        tasks = [asyncio.create_task(collect(runner, request("hi", max_new_tokens=10))) for _ in range(3)]
        await until(lambda: runner.status().num_running == 1)
        stopping = asyncio.create_task(runner.stop(PATIENCE_SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="is stopping"):
            await collect(runner, request("late"))
        assert not runner.status().is_ready
        gate.open()
        assert all(isinstance(chunks[-1], Finished) for chunks in await asyncio.gather(*tasks))
        await stopping
        assert not _engine_threads()
        with pytest.raises(EngineStopped, match="has stopped"):
            await collect(runner, request("late"))


async def test_stop_ends_what_is_left_after_the_grace() -> None:
    decoding, gate = Gate(), Gate()
    async with running(FakeModel(before_decode=decoding, before_tokenize=gate), max_batch=1) as runner:
        decoding.close()
        tasks = [asyncio.create_task(collect(runner, LONG)) for _ in range(2)]
        await until(lambda: runner.status().num_running == 1)
        gate.close()
        tasks.append(asyncio.create_task(collect(runner, LONG)))
        await until(lambda: runner.status().num_waiting == 2)
        stopping = asyncio.create_task(runner.stop(0.02))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineStopped] * 3
        gate.open()
        decoding.open()
        await stopping
        assert held_bytes(runner) == 0
        assert not _engine_threads()
        await runner.stop(1.0)


async def test_a_dying_engine_thread_ends_every_request() -> None:
    async with running(FakeModel(), max_batch=2) as runner:
        tasks = [
            asyncio.create_task(collect(runner, wanted))
            for wanted in (LONG, request(KILLS_THE_ENGINE, max_new_tokens=9), request("in the queue"))
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], EngineStopped)
        assert "the engine died" in str(results[1])
        assert all(isinstance(result, EngineStopped | list) for result in results)
        await until(lambda: not runner.status().is_ready)
        assert not runner.status().is_alive
        with pytest.raises(EngineStopped, match="the engine died"):
            await collect(runner, request("late"))


async def test_what_the_engine_said_comes_before_the_news_of_its_death() -> None:
    async with running(FakeModel()) as runner:
        streams = [runner._open(request(f"{index}"), None) for index in range(8)]
        for _ in range(2):  # what comes at once after other messages waits a moment
            for stream in streams:
                runner._outbox.put(stream, TokenDelta("a", (1,), ()))
            end = time.thread_time() + 0.002
            await asyncio.sleep(0)
            while time.thread_time() < end:
                pass
        runner._die(RuntimeError("gone"))
        assert [type(await streams[0].chunks.get()) for _ in range(3)] == [TokenDelta, TokenDelta, EngineStopped]
