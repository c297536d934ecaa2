"""Preparing beside the engine: who waits for whom, what is let go when, and what ends without waiting."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import torch

from tests.engine.driving import Gate, collect, running
from tests.engine.fake_model import IMAGE, FakeModel, request
from tests.engine.stepping import text
from tests.patience import soon, until
from trimserve.api.chunks import Started, TokenDelta
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.engine.runner import Runner
from trimserve.errors import EngineBusy, EngineStopped
from trimserve.model.prepared import PreparedImage


class _TrackedImage(ImageFile):
    """An image whose end can be seen."""


def _album(num_images: int, name: str = "") -> TokenPrompt:
    """A prompt with images, whose names `FakeModel.images` notes."""
    return TokenPrompt((IMAGE,) * num_images + (65,), (ImageFile(b"1", name),) * num_images)


def _num_tokenised(runner: Runner) -> int:
    """Requests whose images are decoded, or will be."""
    with runner._wake:
        return sum(stream.ticket is not None for stream in runner._streams)


def _no_memory() -> None:
    raise MemoryError


@asynccontextmanager
async def holding_images(**knobs: int) -> AsyncIterator[tuple[Runner, FakeModel, Gate]]:
    """A runner whose model waits before each image until its gate opens."""
    gate = Gate()
    model = FakeModel(before_image=gate)
    async with running(model, **knobs) as runner:
        model.images.clear()  # the warm-up's
        gate.close()
        yield runner, model, gate


async def test_text_does_not_wait_for_the_images_of_others() -> None:
    async with holding_images(num_preprocess_workers=1) as (runner, model, gate):
        tasks = [asyncio.create_task(collect(runner, request(_album(3)))) for _ in range(2)]
        await until(lambda: bool(model.images))
        assert text(await collect(runner, request("hi")))
        assert not any(task.done() for task in tasks)
        gate.open()
        await asyncio.gather(*tasks)


async def test_an_urgent_request_comes_between_two_images() -> None:
    async with holding_images(num_preprocess_workers=1) as (runner, model, gate):
        tasks = [asyncio.create_task(collect(runner, request(_album(2, "first"))))]
        await until(lambda: bool(model.images))
        for name, priority in [("second", 0), ("urgent", 1)]:
            tasks.append(asyncio.create_task(collect(runner, request(_album(2, name), priority=priority))))
            await until(lambda: _num_tokenised(runner) == len(tasks))
        gate.open()
        await asyncio.gather(*tasks)
    assert model.images == ["first", "urgent", "urgent", "first", "second", "second"]


@pytest.mark.parametrize("stage", ["text", "image"])
async def test_a_cancelled_request_lets_go_of_its_images_while_the_workers_are_busy(stage: str) -> None:
    gate = Gate()
    model = FakeModel(before_tokenize=gate) if stage == "text" else FakeModel(before_image=gate)
    async with running(model, num_preprocess_workers=1) as runner:
        gate.close()
        busy = asyncio.create_task(collect(runner, request(_album(1))))
        await until(gate.is_reached.is_set)
        image = _TrackedImage(b"1")
        alive = weakref.ref(image)
        task = asyncio.create_task(collect(runner, request(TokenPrompt((IMAGE, 65), (image,)))))
        del image
        await until(lambda: runner.status().num_waiting == 2 if stage == "text" else _num_tokenised(runner) == 2)
        assert alive() is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        del task
        await until(lambda: alive() is None)
        gate.open()
        await busy


async def test_a_request_holds_no_image_file_while_it_generates_and_no_pixels_once_it_has_ended() -> None:
    pixels: list[weakref.ref[torch.Tensor]] = []

    class Watched(FakeModel):
        def prepare_image(self, image: ImageFile) -> PreparedImage:
            prepared = super().prepare_image(image)
            pixels.append(weakref.ref(prepared.pixel_values))
            return prepared

    gate = Gate()
    async with running(Watched(before_decode=gate)) as runner:
        gate.close()
        image = _TrackedImage(b"1")
        alive = weakref.ref(image)
        chunks = runner.submit(request(TokenPrompt((IMAGE, 65), (image,)), max_new_tokens=5))
        del image
        assert isinstance(await anext(chunks), Started)
        assert isinstance(await anext(chunks), TokenDelta)
        await until(lambda: alive() is None)
        assert pixels[-1]() is not None  # they may be needed to compute it again
        gate.open()
        assert [chunk async for chunk in chunks]
        await until(lambda: all(pixel() is None for pixel in pixels))
    assert len(pixels) == 2  # the warm-up's too


async def test_stop_does_not_wait_for_images() -> None:
    async with holding_images() as (runner, model, gate):
        tasks = [asyncio.create_task(collect(runner, request(_album(4)))) for _ in range(3)]
        await until(lambda: len(model.images) == 2)
        await soon(runner.stop(0.0))
        assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [EngineStopped] * 3
        gate.open()
        await until(lambda: not any(thread.name.startswith("trimserve-image") for thread in threading.enumerate()))
    assert len(model.images) == 2


async def test_no_memory_for_an_image_is_no_fault_of_the_request() -> None:
    model = FakeModel()
    async with running(model) as runner:
        model.before_image = _no_memory
        with pytest.raises(EngineBusy, match="out of memory while request r was prepared"):
            await collect(runner, request(_album(1)))
        assert text(await collect(runner, request("hi")))


async def test_a_bounded_number_of_requests_holds_decoded_images_while_the_engine_is_busy() -> None:
    gate = Gate()
    model = FakeModel(before_decode=gate)
    async with running(model, max_batch=1, num_preprocess_workers=1) as runner:
        gate.close()
        tasks = [asyncio.create_task(collect(runner, request("runs")))]
        await until(lambda: runner.status().num_running == 1)
        model.images.clear()
        tasks += [asyncio.create_task(collect(runner, request(_album(1)))) for _ in range(6)]
        await until(lambda: len(model.images) == 3)
        await asyncio.sleep(0.05)
        assert len(model.images) == 3  # the worker's, and two ahead of the engine
        gate.open()
        await asyncio.gather(*tasks)
        assert len(model.images) == 6
