"""Both RPCs over a real loopback channel."""

import asyncio
import time
from dataclasses import replace

import grpc
import pytest

from tests.patience import soon, until
from tests.server.conftest import Loopback
from tests.server.fakes import CHUNKS, CONFIG, DELTAS, FINISHED, INFO, SELECTION, STARTED, Pause, chat_request
from trimserve import __version__
from trimserve.api.chunks import TokenDelta, TokenLogprob
from trimserve.client import Client
from trimserve.server.grpc.responses import fold
from trimserve.trimming.policies.table import POLICIES
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import model_pb2


async def test_unary_is_the_fold_of_the_stream(loopback: Loopback) -> None:
    unary = await loopback.generation.Generate(chat_request())
    streamed = await fold(loopback.generation.GenerateStream(chat_request()))
    assert unary == streamed
    assert unary.text == "Hello ☃!"


async def test_the_stream_tells_what_the_engine_told(loopback: Loopback) -> None:
    events = [event async for event in loopback.generation.GenerateStream(chat_request())]
    assert [event.WhichOneof("event") for event in events] == ["started", *["delta"] * 3, "finished"]
    started, first, finished = events[0].started, events[1].delta, events[-1].finished
    assert (started.model_id, started.model_revision) == ("fake", "cafe")
    assert (started.num_prompt_tokens, started.seed) == (20, 2**64 - 1)
    usage = started.images[0]
    assert (usage.padding_features, usage.valid_features, usage.kept_features, usage.merged_features) == (10, 10, 4, 1)
    assert started.selections[0].kept == SELECTION.kept
    assert tuple(started.selections[0].picks_by_head) == SELECTION.picks_by_head
    assert started.selections[0].content_width == 50
    assert started.looked_at == pb.Region(top=0.25, left=0, height=0.5, width=0.75)
    assert (first.text, list(first.token_ids)) == ("Hel", [5])
    assert [(top.token_id, top.logprob) for top in first.logprobs[0].top] == [(5, -0.5), (6, -1.5)]
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.matched_stop_string == "\n"
    assert finished.usage.num_generated_tokens == 3
    assert list(finished.usage.images) == list(started.images)
    assert finished.cross_kv_bytes.held == 2048
    assert finished.cross_kv_bytes.saved_by_trimming == 5120
    assert finished.timings.time_to_first_token_seconds == 0.011


async def test_the_unary_answer_has_every_field(loopback: Loopback) -> None:
    answer = await loopback.generation.Generate(chat_request())
    other_stop = "matched_stop_token_id"
    set_fields = {field.name for field, _ in answer.ListFields()}
    assert set_fields == {field.name for field in pb.GenerateResponse.DESCRIPTOR.fields} - {other_stop, "choices"}
    assert list(answer.token_ids) == [token for delta in DELTAS for token in delta.token_ids]
    assert [logprob.logprob for logprob in answer.logprobs] == [-0.5, -0.25, -0.75]


async def test_several_answers_are_streamed_by_number_and_repeated_in_the_unary_answer(loopback: Loopback) -> None:
    ends = [replace(FINISHED, choice=0), replace(FINISHED, choice=1, matched_stop=0, num_generated_tokens=1)]
    other = TokenDelta("Hi", (4,), (TokenLogprob(-1.0, ()),), choice=1)
    loopback.runner.script = (STARTED, DELTAS[0], other, ends[1], *DELTAS[1:], ends[0])
    request = chat_request()
    request.num_choices = 2
    events = [event async for event in loopback.generation.GenerateStream(request)]
    assert [event.delta.choice for event in events if event.HasField("delta")] == [0, 1, 0, 0]
    assert [event.finished.choice for event in events if event.HasField("finished")] == [1, 0]
    answer = await loopback.generation.Generate(request)
    assert loopback.runner.requests[-1].num_choices == 2
    first, second = answer.choices
    set_fields = {field.name for field, _ in first.ListFields()}
    assert set_fields == {field.name for field in pb.Choice.DESCRIPTOR.fields} - {"matched_stop_token_id"}
    assert all(getattr(answer, name) == getattr(first, name) for name in set_fields)
    assert (second.text, list(second.token_ids), second.usage.num_generated_tokens) == ("Hi", [4], 1)
    assert second.WhichOneof("matched_stop") == "matched_stop_token_id"


async def test_a_token_that_stopped_is_told_apart_from_a_string(loopback: Loopback) -> None:
    finished = replace(FINISHED, matched_stop=0)
    loopback.runner.script = (STARTED, finished)
    answer = await loopback.generation.Generate(chat_request())
    assert answer.WhichOneof("matched_stop") == "matched_stop_token_id"
    assert answer.matched_stop_token_id == 0


async def test_a_client_that_cancels_a_stream_reaches_the_runner(loopback: Loopback) -> None:
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED)
    call = loopback.generation.GenerateStream(chat_request())
    await call.read()
    call.cancel()
    await soon(loopback.runner.cancelled.wait())


async def test_a_client_that_cancels_a_unary_call_reaches_the_runner(loopback: Loopback) -> None:
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED)
    call = loopback.generation.Generate(chat_request())
    await soon(loopback.runner.paused.wait())
    call.cancel()
    await soon(loopback.runner.cancelled.wait())


async def test_a_client_that_disconnects_from_a_full_stream_reaches_the_runner(loopback: Loopback) -> None:
    # Nobody reads on, so the server is held in a write, outside the generator that has to be closed.
    loopback.runner.script = (STARTED, *[TokenDelta("x" * 10_000, (1,))] * 1000)

    def read_one_and_disconnect() -> None:
        with Client(loopback.server.address) as client:
            stream = client.stream("Hello")
            next(stream)
            time.sleep(0.2)
            assert loopback.runner.num_running == 1
            client.close()

    await asyncio.to_thread(read_one_and_disconnect)
    await soon(loopback.runner.cancelled.wait())


async def test_a_deadline_reaches_the_runner(loopback: Loopback) -> None:
    before = time.monotonic()
    await loopback.generation.Generate(chat_request(), timeout=20)
    (deadline,) = loopback.runner.deadlines
    assert deadline is not None
    assert before + 19.5 < deadline < time.monotonic() + 20.5  # gRPC rounds timeouts


async def test_without_a_deadline_there_is_none(loopback: Loopback) -> None:
    await loopback.generation.Generate(chat_request())
    assert loopback.runner.deadlines == [None]


async def test_a_passed_deadline_ends_the_call_and_the_request(loopback: Loopback) -> None:
    loopback.runner.script = (Pause.UNTIL_RELEASED,)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loopback.generation.Generate(chat_request(), timeout=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not loopback.runner.num_running)


async def test_no_metadata_comes_before_the_first_message(loopback: Loopback) -> None:
    loopback.runner.script = (Pause.UNTIL_RELEASED, *CHUNKS)
    call = loopback.generation.GenerateStream(chat_request())
    metadata = asyncio.ensure_future(call.initial_metadata())
    await soon(loopback.runner.paused.wait())
    await asyncio.sleep(0.1)
    assert not metadata.done()
    loopback.runner.released.set()
    await metadata
    await fold(call)


async def test_a_request_id_is_drawn_when_none_is_sent(loopback: Loopback) -> None:
    await loopback.generation.Generate(chat_request())
    await loopback.generation.Generate(chat_request())
    first, second = (request.request_id for request in loopback.runner.requests)
    assert first != second
    assert len(first) == 32


async def test_get_model_tells_every_field(loopback: Loopback) -> None:
    model = await loopback.model.GetModel(model_pb2.GetModelRequest())
    assert {field.name for field, _ in model.ListFields()} == set(model.DESCRIPTOR.fields_by_name)
    assert (model.model_id, model.model_revision, model.max_images) == ("fake", "cafe", 3)
    assert model.cross_kv_bytes_per_feature == INFO.cross_kv_bytes_per_feature
    assert model.max_image_bytes == CONFIG.engine.max_image_bytes
    assert list(model.policies) == [policy.name for policy in model.policy_details] == list(POLICIES)
    first, mmr, pool = (model.policy_details[list(POLICIES).index(name)] for name in ("trimmed", "mmr", "pool"))
    assert first.summary.startswith("Each query head picks")
    assert list(first.needs) == ["text"]
    assert mmr.stage == model_pb2.POLICY_STAGE_AFTER_FIRST_LAYER
    assert pool.stage == model_pb2.POLICY_STAGE_BEFORE_DECODER
    assert not pool.budgets
    [parameter] = mmr.parameters
    assert (parameter.name, parameter.default_value, parameter.low, parameter.high) == ("relevance_weight", 0.5, 0, 1)
    assert list(model.generation_defaults.eos_token_ids) == [7, 8]


async def test_a_runner_that_stopped_says_why_and_still_tells_its_model(loopback: Loopback) -> None:
    loopback.runner.is_ready = False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loopback.generation.Generate(chat_request())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the fake takes no requests now"
    assert (await loopback.model.GetModel(model_pb2.GetModelRequest())).model_id == "fake"


async def test_get_server_status_tells_every_field(loopback: Loopback) -> None:
    loopback.runner.num_running = 1
    status = await loopback.model.GetServerStatus(model_pb2.GetServerStatusRequest())
    loopback.runner.num_running = 0
    assert {field.name for field, _ in status.ListFields()} == set(status.DESCRIPTOR.fields_by_name)
    assert (status.version, status.max_queue, status.cross_kv_bytes) == (__version__, 64, 2222)
