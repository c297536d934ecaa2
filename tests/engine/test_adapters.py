"""Adapters come and go while requests run."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ByteSize

from tests.engine.driving import LONG, Gate, collect, running
from tests.engine.fake_model import FakeModel, request
from tests.engine.stepping import text, tokens
from tests.patience import until
from trimserve.api.adapter import AdapterInfo
from trimserve.api.chunks import GenerationChunk
from trimserve.config import EngineConfig
from trimserve.engine import engine
from trimserve.engine.adapters import Adapters
from trimserve.engine.runner import Runner
from trimserve.errors import AdapterError, AdapterExists, EngineStopped, OutOfMemory, UnknownAdapter
from trimserve.executor.local import LocalExecutor

MINE = replace(request("hi"), adapter="mine")
LONG_MINE = replace(LONG, adapter="mine")
FOLDER = Path("some/folder")
CONFIG = EngineConfig(image_cache_bytes=ByteSize(0))
NUM_BYTES = 12
"""Of an adapter of the fake."""


async def test_a_request_may_name_what_is_loaded_and_nothing_else() -> None:
    async with running(FakeModel({"hi": "hello"})) as runner:
        with pytest.raises(UnknownAdapter, match="adapter 'mine' is not loaded; loaded are none"):
            await collect(runner, MINE)
        info = await runner.load_adapter("mine", FOLDER)
        assert (info.name, info.folder, info.num_bytes, info.rank) == ("mine", "some/folder", NUM_BYTES, 4)
        assert text(await collect(runner, MINE)) == "hello"
        with pytest.raises(UnknownAdapter, match="adapter 'other' is not loaded; loaded are 'mine'"):
            await collect(runner, replace(MINE, adapter="other"))
        with pytest.raises(AdapterExists, match="adapter 'mine' is loaded"):
            await runner.load_adapter("mine", FOLDER)
        await runner.unload_adapter("mine")
        with pytest.raises(UnknownAdapter):
            await collect(runner, MINE)
        with pytest.raises(UnknownAdapter):
            await runner.unload_adapter("mine")


async def test_a_request_takes_what_it_has_again_while_that_is_being_unloaded() -> None:
    adapters = Adapters()

    async def read() -> AdapterInfo:
        return AdapterInfo("mine", "some/folder", NUM_BYTES, 4, (), changes_image_features=False)

    async def forget() -> None:
        assert adapters.loaded()[0].num_requests == 0

    await adapters.load("mine", read)
    adapters.take("mine")
    unloading = asyncio.create_task(adapters.unload("mine", forget))
    await until(lambda: adapters.loaded()[0].is_unloading)
    with pytest.raises(UnknownAdapter, match="adapter 'mine' is being unloaded"):
        adapters.take("mine")
    adapters.take("mine", is_held=True)
    for _ in range(2):
        assert not unloading.done()
        adapters.give_back("mine")
    await unloading


async def test_unloading_waits_for_the_requests_that_have_it_and_refuses_new_ones() -> None:
    async with running(FakeModel()) as runner:
        expected = tokens(await collect(runner, LONG))
        await runner.load_adapter("mine", FOLDER)
        streams = [asyncio.create_task(collect(runner, LONG_MINE)) for _ in range(3)]
        await until(lambda: runner.adapters()[0].num_requests == 3)
        unloading = asyncio.create_task(runner.unload_adapter("mine"))
        await until(lambda: runner.adapters()[0].is_unloading)
        with pytest.raises(UnknownAdapter, match="adapter 'mine' is being unloaded"):
            await collect(runner, MINE)
        with pytest.raises(AdapterExists, match="adapter 'mine' is being unloaded"):
            await runner.load_adapter("mine", FOLDER)
        assert runner.status().adapter_bytes == runner.status().memory_bytes["adapters"] == NUM_BYTES
        await asyncio.gather(unloading, runner.unload_adapter("mine"))
        assert all(stream.done() for stream in streams)
        assert [tokens(await stream) for stream in streams] == [expected] * 3
        assert (runner.adapters(), runner.status().adapter_bytes) == ((), 0)
        await runner.load_adapter("mine", FOLDER)


async def unloading_in_a_step(
    runner: Runner, gate: Gate
) -> tuple[asyncio.Task[list[GenerationChunk]], asyncio.Task[None]]:
    """A request whose step waits at the gate, and the unloading of its adapter."""
    await runner.load_adapter("mine", FOLDER)
    gate.close()
    stream = asyncio.create_task(collect(runner, LONG_MINE))
    await until(gate.is_reached.is_set)
    unloading = asyncio.create_task(runner.unload_adapter("mine"))
    await until(lambda: runner.adapters()[0].is_unloading)
    return stream, unloading


async def test_a_request_that_is_cancelled_holds_its_adapter_no_longer() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate)) as runner:
        stream, unloading = await unloading_in_a_step(runner, gate)
        stream.cancel()
        await until(lambda: runner.adapters()[0].num_requests == 0)
        assert not unloading.done()  # the engine is in a step with it
        gate.open()
        await unloading


async def test_who_waits_for_an_adapter_no_longer_does_not_stop_it() -> None:
    gate = Gate()
    async with running(FakeModel(before_adapter=gate)) as runner:
        gate.close()
        loading = asyncio.create_task(runner.load_adapter("mine", FOLDER))
        await until(gate.is_reached.is_set)
        with pytest.raises(AdapterExists, match="adapter 'mine' is being loaded"):
            await runner.load_adapter("mine", FOLDER)
        with pytest.raises(UnknownAdapter):
            await collect(runner, MINE)
        loading.cancel()
        gate.open()
        await until(lambda: bool(runner.adapters()))
        stream = asyncio.create_task(collect(runner, LONG_MINE))
        await until(lambda: runner.adapters()[0].num_requests == 1)
        unloading = asyncio.create_task(runner.unload_adapter("mine"))
        await until(lambda: runner.adapters()[0].is_unloading)
        unloading.cancel()
        await stream
        await until(lambda: not runner.adapters())


async def test_an_adapter_that_cannot_be_read_leaves_its_name_free() -> None:
    async with running(FakeModel({"hi": "hello"})) as runner:
        with pytest.raises(AdapterError, match="broken: is broken"):
            await runner.load_adapter("mine", Path("broken"))
        await runner.load_adapter("mine", FOLDER)
        assert text(await collect(runner, MINE)) == "hello"


async def test_an_adapter_larger_than_what_is_free_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(100))
    async with running(FakeModel()) as runner:
        monkeypatch.setattr(engine, "available_bytes", lambda _: 99)
        with pytest.raises(OutOfMemory, match="adapter 'mine' takes up to 100 bytes, 99 are free"):
            await runner.load_adapter("mine", tmp_path)
        monkeypatch.setattr(engine, "available_bytes", lambda _: 100)
        await runner.load_adapter("mine", tmp_path)


async def test_adapters_of_the_start_are_there_with_the_first_request_or_the_start_fails() -> None:
    model = FakeModel({"hi": "hello"})
    runner = Runner(lambda: (model, LocalExecutor(model)), CONFIG, adapters={"mine": FOLDER, "other": Path("vision")})
    await runner.start()
    assert [(each.info.name, each.info.changes_image_features) for each in runner.adapters()] == [
        ("mine", False),
        ("other", True),
    ]
    assert text(await collect(runner, MINE)) == "hello"
    await runner.stop(0.0)
    with pytest.raises(EngineStopped, match="the engine has stopped"):
        await runner.load_adapter("third", FOLDER)
    broken = Runner(lambda: (model, LocalExecutor(model)), CONFIG, adapters={"mine": Path("broken")})
    with pytest.raises(AdapterError, match="broken: is broken"):
        await broken.start()


async def test_a_server_that_stops_gives_up_unloading() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate)) as runner:
        stream, unloading = await unloading_in_a_step(runner, gate)
        stopping = asyncio.create_task(runner.stop(0.0))
        with pytest.raises(EngineStopped, match="before the adapter was loaded or unloaded"):
            await unloading
        gate.open()
        await stopping
        with pytest.raises(EngineStopped):
            await stream
