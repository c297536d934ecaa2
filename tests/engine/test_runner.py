"""The runner on a real event loop: streams, bounds, cancellation, deadlines."""

import asyncio
import time
from contextlib import aclosing

import pytest

from tests.engine.driving import LONG, Gate, collect, held_bytes, running
from tests.engine.fake_model import (
    BREAKS_DECODE,
    BREAKS_PREFILL,
    BREAKS_PREPARE,
    IMAGE,
    LOGITS_ARE_NAN,
    FakeModel,
    request,
)
from tests.engine.stepping import text, tokens
from tests.patience import until
from trimserve.api.chunks import Finished, GenerationChunk, Started, TokenDelta
from trimserve.api.prompt import ImageFile, RawPrompt, TokenPrompt
from trimserve.api.status import WorkersStatus
from trimserve.errors import DeadlinePassed, EngineBusy, InvalidRequest, RequestFailed


async def test_chunks_arrive_in_order_and_say_the_reply() -> None:
    async with running(FakeModel({"hi": "hello 😀"})) as runner:
        first, *middle, last = await collect(runner, request("hi", name="mine"))
        assert isinstance(first, Started)
        assert first.request_id == "mine"
        assert isinstance(last, Finished)
        assert all(isinstance(chunk, TokenDelta) for chunk in middle)
        assert text(middle) == "hello 😀"


async def test_many_requests_at_once_get_what_each_gets_alone() -> None:
    wanted = [request(f"prompt {n}", temperature=1.0, seed=n, max_new_tokens=5 + n) for n in range(10)]
    gate = Gate()
    model = FakeModel(before_decode=gate)
    async with running(model, max_queue=10) as runner:
        alone = [await collect(runner, one) for one in wanted]
        model.batch_sizes.clear()
        gate.close()
        tasks = [asyncio.create_task(collect(runner, one)) for one in wanted]
        await until(lambda: len([stream for stream in runner._streams if stream.sequence]) == len(wanted))
        gate.open()
        together = await asyncio.gather(*tasks)
        assert [tokens(chunks) for chunks in together] == [tokens(chunks) for chunks in alone]
        assert max(model.batch_sizes) == 4


async def test_the_model_runs_on_the_engine_thread_only() -> None:
    model = FakeModel()
    async with running(model) as runner:
        await collect(runner, request("hi"))
    assert model.threads == {"trimserve-engine"}


async def test_the_event_loop_is_free_while_the_model_computes() -> None:
    gate = Gate()
    async with running(FakeModel(before_prefill=gate)) as runner:
        gate.close()
        task = asyncio.create_task(collect(runner, request("hi")))
        await until(lambda: runner.status().num_running == 1)
        await asyncio.sleep(0.01)
        assert not task.done()
        gate.open()
        assert text(await task)


async def test_status_counts_what_waits_and_runs_and_what_it_holds() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate), max_batch=1, max_queue=3) as runner:
        idle = runner.status()
        assert (idle.is_ready, idle.num_running, idle.num_waiting) == (True, 0, 0)
        assert (idle.max_batch, idle.max_queue) == (1, 3)
        assert held_bytes(runner) == 0
        gate.close()
        image = runner.info.image_token_id
        prompt = TokenPrompt((image, 65), (_image(4),))
        tasks = [asyncio.create_task(collect(runner, request(prompt))) for _ in range(3)]
        await until(lambda: runner.status().cross_kv_untrimmed_bytes > 0)
        status = runner.status()
        assert (status.num_running, status.num_waiting) == (1, 2)
        # 20 valid features are 2 pages, the 10 kept ones 1 page, of 16 positions in 3 layers.
        assert (status.cross_kv_untrimmed_bytes, status.cross_kv_bytes) == (2 * 16 * 3 * 8, 16 * 3 * 8)
        assert status.self_kv_bytes > 0
        assert status.uptime_seconds > idle.uptime_seconds > 0
        gate.open()
        await asyncio.gather(*tasks)
        assert (runner.status().num_running, runner.status().num_waiting, held_bytes(runner)) == (0, 0, 0)


async def test_a_full_queue_refuses_naming_its_size() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate), max_batch=1, max_queue=2) as runner:
        gate.close()
        tasks = [asyncio.create_task(collect(runner, request("hi"))) for _ in range(3)]
        await until(lambda: runner.status().num_waiting == 2)
        with pytest.raises(EngineBusy, match=r"queue of 2 \(max_queue\) is full"):
            await collect(runner, request("one too many"))
        gate.open()
        await asyncio.gather(*tasks)
        assert await collect(runner, request("there is room again"))


async def test_requests_being_prepared_count_as_waiting() -> None:
    gate = Gate()
    async with running(FakeModel(before_tokenize=gate), max_batch=1, max_queue=1) as runner:
        gate.close()
        tasks = [asyncio.create_task(collect(runner, request("hi"))) for _ in range(2)]
        await until(lambda: runner.status().num_waiting == 2)
        with pytest.raises(EngineBusy):
            await collect(runner, request("one too many"))
        gate.open()
        await asyncio.gather(*tasks)


async def test_what_preparing_refuses_reaches_the_caller() -> None:
    async with running(FakeModel()) as runner:
        with pytest.raises(InvalidRequest, match="must not be empty"):
            await collect(runner, request(""))
        with pytest.raises(InvalidRequest, match="room for 126, got 1000") as raised:
            await collect(runner, request("hi", max_new_tokens=1000))
        assert raised.value.field == "sampling.max_new_tokens"
        assert runner.status().num_waiting == 0


@pytest.mark.parametrize("bad", [BREAKS_PREPARE, BREAKS_PREFILL, BREAKS_DECODE, LOGITS_ARE_NAN])
async def test_a_failing_request_leaves_the_others_alone(bad: RawPrompt) -> None:
    async with running(FakeModel()) as runner:
        expected = await collect(runner, request("good"))
        good, failed = await asyncio.gather(
            collect(runner, request("good")), collect(runner, request(bad)), return_exceptions=True
        )
        assert isinstance(failed, RequestFailed)
        assert not isinstance(good, BaseException)
        assert tokens(good) == tokens(expected)
        assert held_bytes(runner) == 0


@pytest.mark.parametrize("place", ["prepare", "queue", "prefill", "decode"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_request_that_nobody_waits_for_ends_within_a_step(place: str, how: str) -> None:
    gates = {"prepare": Gate(), "prefill": Gate(), "decode": Gate()}
    model = FakeModel(before_tokenize=gates["prepare"], before_prefill=gates["prefill"], before_decode=gates["decode"])
    async with running(model, max_batch=1) as runner:
        gate = gates["decode" if place == "queue" else place]
        gate.close()
        other = None
        if place == "queue":
            other = asyncio.create_task(collect(runner, request("other")))
            await until(lambda: runner.status().num_running == 1)
        deadline = time.monotonic() + 0.05 if how == "deadline" else None
        task = asyncio.create_task(collect(runner, LONG, deadline))
        if place in ("prepare", "queue"):
            await until(lambda: task.done() or runner.status().num_waiting == 1)
        else:
            await until(lambda: task.done() or runner.status().num_running == 1)
        if how == "cancel":
            task.cancel()
        # The answer comes at once, while the model is still busy.
        with pytest.raises(asyncio.CancelledError if how == "cancel" else DeadlinePassed):
            await task
        assert runner.status().num_waiting == 0
        num_decodes = len(model.batch_sizes)
        gate.open()
        if other is not None:
            assert text(await other)
        else:
            await until(lambda: held_bytes(runner) == 0)
            assert len(model.batch_sizes) <= num_decodes + 1
        assert held_bytes(runner) == 0
        assert await collect(runner, request("next"))


async def test_closing_the_stream_frees_the_request_while_it_runs() -> None:
    gate = Gate()
    model = FakeModel(before_decode=gate)
    async with running(model) as runner:
        model.batch_sizes.clear()
        gate.close()
        async with aclosing(runner.submit(LONG)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, TokenDelta):
                    break
        gate.open()
        await until(lambda: held_bytes(runner) == 0)
        assert len(model.batch_sizes) <= 1


async def test_a_deadline_says_where_the_request_was() -> None:
    gate = Gate()
    async with running(FakeModel(before_decode=gate), max_batch=1) as runner:
        gate.close()
        tasks: list[asyncio.Task[list[GenerationChunk]]] = []
        for prompt in ("runs", "waits"):
            tasks.append(asyncio.create_task(collect(runner, request(prompt, max_new_tokens=120))))
            await until(lambda: len([stream for stream in runner._streams if stream.sequence]) == len(tasks))
        await until(lambda: runner.status().num_running == 1)
        for stream in tuple(runner._streams):
            runner._expire(stream)
        for task, doing in zip(tasks, ("running", "waiting"), strict=True):
            with pytest.raises(DeadlinePassed, match=f"while the request was {doing}"):
                await task
        gate.open()


async def test_a_deadline_that_comes_too_soon_is_refused_at_once() -> None:
    async with running(FakeModel(before_decode=lambda: time.sleep(0.02)), max_batch=1) as runner:
        assert await collect(runner, request("measure", max_new_tokens=2, ignore_eos=True))
        with pytest.raises(DeadlinePassed, match="cannot be met"):
            await collect(runner, LONG, time.monotonic() + 2)  # it takes 119 steps
        with pytest.raises(DeadlinePassed):
            await collect(runner, LONG, time.monotonic() - 1)
        assert await collect(runner, request("hi"), time.monotonic() + 60)


async def test_a_slow_warm_up_makes_no_deadline_too_near() -> None:
    slow = iter([0.5])  # what is made ready on first use
    async with running(FakeModel(before_decode=lambda: time.sleep(next(slow, 0.0)))) as runner:
        assert await collect(runner, LONG, time.monotonic() + 50)  # 119 steps as slow would take longer


async def test_an_idle_engine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(FakeModel()) as runner:
        await collect(runner, request("hi"))
        await until(lambda: not runner._loaded.has_work)
        num_steps = 0

        def step() -> None:
            nonlocal num_steps
            num_steps += 1

        monkeypatch.setattr(runner._loaded, "step", step)
        await asyncio.sleep(0.1)
        assert num_steps <= 1  # what it was told last


async def test_equal_request_ids_do_not_meet() -> None:
    async with running(FakeModel({"a": "first", "b": "second"})) as runner:
        one, other = await asyncio.gather(
            collect(runner, request("a", name="same")), collect(runner, request("b", name="same"))
        )
        assert (text(one), text(other)) == ("first", "second")


async def test_tokens_that_nobody_waited_for_come_together() -> None:
    gate = Gate()
    async with running(FakeModel({"hi": "0123456789"}, before_decode=gate)) as runner:
        gate.close()
        async with aclosing(runner.submit(request("hi"))) as chunks:
            assert isinstance(await anext(chunks), Started)
            first = await anext(chunks)
            gate.open()
            await until(lambda: runner.status().num_running == 0)
            late, last = [chunk async for chunk in chunks]
    assert isinstance(first, TokenDelta)
    assert isinstance(late, TokenDelta)
    assert isinstance(last, Finished)
    assert (first.text, late.text, len(late.token_ids)) == ("0", "123456789", 10)


def _image(num_tiles: int) -> ImageFile:
    return ImageFile(str(num_tiles).encode())


async def test_a_worker_that_is_at_one_job_for_too_long_makes_the_engine_unready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    async with running(FakeModel(before_image=gate)) as runner:
        idle = WorkersStatus(num_workers=2, num_busy=0, oldest_job_seconds=0)
        await until(lambda: runner.status().workers == {"text": idle, "image": idle})
        gate.close()
        task = asyncio.create_task(collect(runner, request(TokenPrompt((IMAGE, 65), (ImageFile(b"1"),)))))
        await until(gate.is_reached.is_set)
        assert runner.status().workers["image"].num_busy == 1
        assert runner.status().is_ready
        monkeypatch.setattr(runner._workers.images, "_clock", lambda: time.monotonic() + 100_000)
        assert runner.status().workers["image"].oldest_job_seconds > 99_999
        assert not runner.status().is_ready
        gate.open()
        await task
        await until(lambda: runner.status().is_ready)
