"""Requests that look again: where, and that the answer is that of a prompt with the region as a second image."""

import asyncio
import io
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PilImage

from tests.engine.driving import Gate, collect
from tests.engine.driving import running as running_fake
from tests.engine.fake_model import FakeModel
from tests.engine.fake_model import request as short
from tests.engine.stepping import tokens
from tests.engine.test_real_model import GREEDY, SAMPLED, noise
from tests.patience import until
from trimserve.api.chunks import Finished, GenerationChunk, ImageSelection, Started
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Prompt, RawPrompt, Region, Text
from trimserve.api.request import GenerationRequest
from trimserve.api.trim import FixedRatio, LookAgain, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.look_again import most_voted
from trimserve.engine.runner import Runner
from trimserve.errors import EngineBusy, InvalidRequest
from trimserve.executor.local import LocalExecutor
from trimserve.executor.plan import StepPlan, StepResult
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

PATCH = 8
TRIMMED = TrimRequest(k_ratio=0.1, merge_ratio=0.1)
AGAIN = replace(TRIMMED, look_again=LookAgain())


def selection(
    heads: list[NDArray[np.int64]], *, content: tuple[int, int] | None = None, kept: NDArray[np.int64] | None = None
) -> ImageSelection:
    """Of an image of 1 x 2 tiles of 4 x 4 patches: what each head picked, [4, 8], and all class tokens."""

    def packed(grid: NDArray[np.int64]) -> bytes:
        tiles = np.concatenate([np.ones((2, 1), np.int64), grid.reshape(4, 2, 4).swapaxes(0, 1).reshape(2, 16)], axis=1)
        return np.packbits(tiles.ravel(), bitorder="little").tobytes()

    high, wide = content or (4 * PATCH, 8 * PATCH)
    is_kept = np.max(heads, axis=0) if kept is None else kept
    return ImageSelection(1, 2, 17, high, wide, packed(is_kept), tuple(packed(head) for head in heads))


def grid(*places: tuple[int, int]) -> NDArray[np.int64]:
    """[4, 8], 1 at these rows and columns."""
    marked = np.zeros((4, 8), np.int64)
    for place in places:
        marked[place] = 1
    return marked


REGIONS = [  # what heads picked, side, where the region begins
    ([grid((1, 5)), grid((1, 5))], 0.5, (0.125, 0.4375)),  # its middle is the patch's, (1.5 / 4, 5.5 / 8)
    ([grid((0, 0)), grid((0, 0))], 0.5, (0, 0)),  # no further than the image
    ([grid((3, 7)), grid((3, 7))], 0.5, (0.5, 0.5)),
    ([grid((0, 0), (2, 6)), grid((2, 6))], 0.25, (0.5, 0.6875)),  # two heads against one
    ([grid((0, 0)), grid((3, 7))], 0.5, (0, 0)),  # a tie: the upper left
    ([grid((1, 2), (1, 4)), grid((2, 3))], 0.5, (0.125 + 1 / 12, 0.1875)),  # the mean place of votes
    ([grid(), grid()], 0.5, (0.25, 0.25)),  # class tokens only
    ([grid((1, 5))], 1.0, (0, 0)),
]


@pytest.mark.parametrize(("heads", "side", "begin"), REGIONS)
def test_the_region_has_most_votes_in_its_middle(
    heads: list[NDArray[np.int64]], side: float, begin: tuple[float, float]
) -> None:
    region = most_voted(selection(heads), PATCH, side)
    assert (region.top, region.left) == pytest.approx(begin)
    assert (region.height, region.width) == (side, side)


def test_votes_for_what_a_cap_dropped_do_not_count() -> None:
    heads = [grid((0, 0), (3, 7)), grid((0, 0))]
    region = most_voted(selection(heads, kept=grid((3, 7))), PATCH, 0.5)
    assert (region.top, region.left) == (0.5, 0.5)


def test_shares_are_of_the_image_and_not_of_its_canvas() -> None:
    region = most_voted(selection([grid((1, 5))], content=(2 * PATCH, 6 * PATCH + 4)), PATCH, 0.5)
    assert (region.top, region.left) == pytest.approx((0.5, 0.5))  # the lower end of 2 patches, the right one of 6.5


# ---- with a model ----


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Mllama:
    return load_model(ModelConfig(model=str(checkpoint)), EngineConfig())


@asynccontextmanager
async def running(model: Mllama, executor: LocalExecutor | None = None, **knobs: int) -> AsyncIterator[Runner]:
    """A started runner of the model, with an image cache."""
    runner = Runner(lambda: (model, executor or LocalExecutor(model, 2**22)), EngineConfig(**knobs))  # type: ignore[arg-type]  # knobs of every type
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop(0.0)


def asked(image: ImageFile, trim: TrimRequest = AGAIN) -> GenerationRequest:
    return GenerationRequest("again", RawPrompt("Look:<|image|>What is this?", (image,)), GREEDY, trim)


def ends(chunks: list[GenerationChunk]) -> tuple[Started, Finished]:
    started, finished = chunks[0], chunks[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    return started, finished


@pytest.mark.parametrize(("high", "wide"), [(1, 1), (2, 2), (1, 3)])
async def test_the_answer_is_that_of_a_prompt_with_the_region_as_its_second_image(
    model: Mllama, high: int, wide: int
) -> None:
    request = asked(noise(2 * high, 2 * wide, 1), replace(AGAIN, return_selection=True))
    async with running(model) as runner:
        chunks = await collect(runner, request)
        once = await collect(runner, replace(request, trim=replace(TRIMMED, return_selection=True)))
        region = most_voted(ends(once)[0].selections[0], PATCH, 0.5)
        part = _cut(request, region)
        assert isinstance(request.prompt, RawPrompt)
        by_hand = RawPrompt("Look:<|image|><|image|>What is this?", (*request.prompt.images, part))
        expected = await collect(runner, GenerationRequest("by hand", by_hand, GREEDY, once_trim(request)))
    started, finished = ends(chunks)
    told, finished_by_hand = ends(expected)
    assert started.looked_at == region
    assert (tokens(chunks), started.images, started.selections) == (tokens(expected), told.images, told.selections)
    assert finished.cross_kv == finished_by_hand.cross_kv
    assert started.num_prompt_tokens == ends(once)[0].num_prompt_tokens + 1
    assert tokens(chunks) != tokens(once)
    assert ends(once)[0].looked_at is None


def once_trim(request: GenerationRequest) -> TrimRequest:
    return replace(request.trim, look_again=None)


def _cut(request: GenerationRequest, region: Region) -> ImageFile:
    assert isinstance(request.prompt, RawPrompt)
    pixels = np.asarray(PilImage.open(io.BytesIO(request.prompt.images[0].data)))
    high, wide, _ = pixels.shape
    rows = slice(round(region.top * high), round((region.top + region.height) * high))
    columns = slice(round(region.left * wide), round((region.left + region.width) * wide))
    buffer = io.BytesIO()
    PilImage.fromarray(pixels[rows, columns]).save(buffer, "PNG")
    return ImageFile(buffer.getvalue())


async def test_in_a_batch_each_looks_where_it_looks_alone(model: Mllama) -> None:
    requests = [asked(noise(high, wide, seed)) for seed, (high, wide) in enumerate([(1, 1), (4, 4), (1, 2), (2, 4)])]
    requests += [replace(requests[1], sampling=replace(SAMPLED, seed=7)), asked(noise(2, 2, 9), TRIMMED)]
    async with running(model) as runner:
        alone = [await collect(runner, request) for request in requests]
        together = await asyncio.gather(*(collect(runner, request) for request in requests))
    assert [tokens(chunks) for chunks in together] == [tokens(chunks) for chunks in alone]
    assert [ends(chunks)[0].looked_at for chunks in together] == [ends(chunks)[0].looked_at for chunks in alone]
    assert len({ends(chunks)[0].looked_at for chunks in alone}) > 2


async def test_times_are_those_of_both_passes(model: Mllama) -> None:
    async with running(model) as runner:
        started, finished = ends(await collect(runner, asked(noise(4, 4, 1))))
    stages = [span.stage for span in started.spans]
    assert (stages.count("prefill"), stages.count("image_decode"), stages[-1]) == (2, 3, "prefill")
    assert all(span.begin <= span.end for span in started.spans)
    times = finished.timings
    parts = (times.queue_seconds, times.preprocess_seconds, times.vision_seconds, times.prefill_seconds)
    assert min(parts) >= 0
    assert sum(parts) + times.decode_seconds == pytest.approx(times.total_seconds)
    prefills = [span.end - span.begin for span in started.spans if span.stage == "prefill"]
    assert times.prefill_seconds == pytest.approx(sum(prefills))


async def test_every_answer_to_one_prompt_sees_the_region(model: Mllama) -> None:
    request = replace(asked(noise(2, 2, 1)), sampling=SAMPLED, num_choices=3)
    async with running(model) as runner:
        chunks = await collect(runner, request)
    assert sorted(chunk.choice for chunk in chunks if isinstance(chunk, Finished)) == [0, 1, 2]


async def test_a_full_queue_refuses_no_pass_of_what_was_let_in_before() -> None:
    gate = Gate()
    async with running_fake(FakeModel(before_decode=gate), max_batch=1, max_queue=1) as runner:
        gate.close()
        others = [asyncio.create_task(collect(runner, short("hi"))) for _ in range(2)]
        await until(lambda: runner.status().num_waiting == 1)
        with pytest.raises(EngineBusy):
            await collect(runner, short("new"))
        came_at = time.monotonic()
        next_pass = asyncio.create_task(anext(runner._generate(short("next"), None, came_at)))
        await until(lambda: runner.status().num_waiting == 2)
        gate.open()
        assert isinstance(await next_pass, Started)
        await asyncio.gather(*others)


async def test_a_draining_engine_finishes_the_second_pass(model: Mllama) -> None:
    gate = Gate()

    class Watched(LocalExecutor):
        def run(self, plan: StepPlan) -> StepResult:
            if plan.new:
                gate()
            return super().run(plan)

    async with running(model, Watched(model)) as runner:
        gate.close()
        task = asyncio.create_task(collect(runner, asked(noise(2, 2, 1))))
        await until(gate.is_reached.is_set)
        stopping = asyncio.create_task(runner.stop(60.0))
        await asyncio.sleep(0)
        gate.open()
        assert len(tokens(await task)) == GREEDY.max_new_tokens
        await stopping


IMAGE = noise(2, 2, 1)
REFUSED: list[tuple[Prompt, TrimRequest, str]] = [
    (RawPrompt("no image"), AGAIN, "exactly 1 image, got 0"),
    (RawPrompt("<|image|><|image|>two", (IMAGE, IMAGE)), AGAIN, "exactly 1 image, got 2"),
    (ChatPrompt((Message("user", (IMAGE, IMAGE, Text("two"))),)), AGAIN, "exactly 1 image, got 2"),
    (RawPrompt("<|image|>", (IMAGE,)), replace(AGAIN, enabled=False), "can drop something"),
    (RawPrompt("<|image|>", (IMAGE,)), replace(AGAIN, k_ratio=1.0), "can drop something"),
    (RawPrompt("<|image|>", (IMAGE,)), replace(AGAIN, budget=FixedRatio(1.0)), "can drop something"),
    (
        RawPrompt("<|image|>", (IMAGE,)),
        replace(AGAIN, policy="mean"),
        r"whose heads vote \(trimmed, guided\), .*'mean'",
    ),
]


async def test_what_cannot_look_again_is_refused_by_name(model: Mllama) -> None:
    async with running(model) as runner:
        for prompt, trim, words in REFUSED:
            with pytest.raises(InvalidRequest, match=rf"^trim.look_again: needs .*{words}"):
                await collect(runner, GenerationRequest("refused", prompt, GREEDY, trim))
        few = replace(model.info, max_images=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "info", few)
            with pytest.raises(InvalidRequest, match=r"takes 2 images in a request \(--max-images\)"):
                await collect(runner, asked(IMAGE))
