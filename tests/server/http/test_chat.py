"""Chat completions through the `openai` client: what is asked arrives, and what is answered comes back."""

import asyncio
import base64
import dataclasses
import json
import logging
from typing import Any

import openai
import pytest

from tests.patience import soon
from tests.server.fakes import CHUNKS, DEFAULTS, DELTAS, FINISHED, INFO, STARTED, FakeRunner, Pause
from tests.server.http.conftest import Door, ask, open_door
from tests.server.logged import line_of
from trimserve.api.chunks import FinishReason, TokenDelta, TokenLogprob
from trimserve.api.constraint import JsonObject, JsonSchema
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import FixedRatio
from trimserve.errors import (
    DeadlinePassed,
    EngineBusy,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    RequestFailed,
    UnknownAdapter,
)
from trimserve.server.grpc import statuses as grpc_statuses
from trimserve.server.http import statuses as http_statuses

ANSWER = "".join(delta.text for delta in DELTAS)
PNG = b"\x89PNG not really"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}}


async def test_a_whole_answer_has_text_usage_and_the_account(door: Door) -> None:
    answer = await ask(door)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "fake", INFO.revision)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 3, 23)
    account = answer.trimserve
    assert account["cross_kv_bytes"]["held"] == FINISHED.cross_kv.held
    assert account["images"][0]["kept_features"] == STARTED.images[0].kept_features
    assert (account["seed"], account["matched_stop"]) == (STARTED.seed, "\n")
    assert base64.b64decode(account["selections"][0]["kept"]) == STARTED.selections[0].kept
    assert account["looked_at"] == {"top": 0.25, "left": 0, "height": 0.5, "width": 0.75}


async def test_a_stream_joined_is_the_whole_answer(door: Door) -> None:
    chunks = [chunk async for chunk in await ask(door, stream=True, stream_options={"include_usage": True})]
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    *_, last, usage = chunks
    assert (last.choices[0].finish_reason, last.usage) == ("stop", None)
    assert (usage.choices, usage.usage.total_tokens) == ([], 23)
    assert last.trimserve == (await ask(door)).trimserve
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_has_no_usage_unless_it_is_asked_for(door: Door) -> None:
    chunks = [chunk async for chunk in await ask(door, stream=True)]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_an_entry_for_each_token(door: Door, stream: bool) -> None:
    answer = await ask(door, logprobs=True, top_logprobs=2, stream=stream)
    choices = [choice async for chunk in answer for choice in chunk.choices] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [(entry.token, entry.logprob) for entry in entries] == [("<5>", -0.5), ("<6>", -0.25), ("<9>", -0.75)]
    assert [(each.token, each.logprob) for each in entries[0].top_logprobs] == [("<5>", -0.5), ("<6>", -1.5)]
    assert bytes(entries[0].bytes) == b"<5>"


async def test_messages_arrive_with_their_roles_parts_and_images(door: Door) -> None:
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}], "name": "Ann"},
        {"role": "assistant", "content": "A cat", "tool_calls": None, "annotations": []},
        {"role": "user", "content": ""},
    ]
    await ask(door, messages=messages)
    assert door.runner.requests[0].prompt == ChatPrompt(
        (
            Message("system", (Text("Be brief"),)),
            Message("user", (ImageFile(PNG), Text("What?"))),
            Message("assistant", (Text("A cat"),)),
            Message("user", (Text(""),)),
        )
    )


async def test_base64_in_lines_is_an_image(door: Door) -> None:
    picture = PNG * 20
    url = "data:image/png;base64," + base64.encodebytes(picture).decode().replace("\n", "\r\n")
    await ask(door, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert door.runner.requests[0].prompt == ChatPrompt((Message("user", (ImageFile(picture),)),))


async def test_sampling_fields_arrive_and_unset_ones_are_the_checkpoints(door: Door) -> None:
    await ask(door, user="me", metadata={"a": "b"}, tools=[], n=1, response_format={"type": "text"})
    sampling = door.runner.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.9, None)
    await ask(
        door,
        temperature=1,
        top_p=0.5,
        max_completion_tokens=7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1.5},
        seed=2**64 - 1,
        stop=["a", "b"],
        logprobs=True,
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 2, "min_tokens": 2, "ignore_eos": True},
    )
    sampling = door.runner.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.min_new_tokens) == (1, 0.5, 7, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.seed, sampling.stop_strings) == ({5: -100, 6: 1.5}, 2**64 - 1, ("a", "b"))
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.ignore_eos) == (3, 0.1, 2, True)
    assert sampling.num_top_logprobs == 0
    assert DEFAULTS.temperature == 0.6


async def test_the_extension_sets_trimming_priority_and_deadline(door: Door) -> None:
    trim = {"k_ratio": 0.25, "budget": {"ratio": 0.5}, "return_selection": True}
    await ask(door, extra_body={"trimserve": {"trim": trim, "priority": 5, "timeout_seconds": 60}})
    request = door.runner.requests[0]
    assert (request.trim.k_ratio, request.trim.budget, request.trim.return_selection) == (0.25, FixedRatio(0.5), True)
    assert request.priority == 5
    assert door.runner.deadlines[0] is not None
    await ask(door, extra_body={"trimserve": {"trim": {"mode": "TRIM_MODE_OFF"}}})
    assert not door.runner.requests[1].trim.enabled


async def test_a_response_format_arrives_as_a_constraint(door: Door) -> None:
    await ask(door, response_format={"type": "json_object"})
    assert door.runner.requests[-1].constraint == JsonObject()
    wanted = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"const": "☃"}}}
    named = {"name": "person", "description": "Who", "strict": True, "schema": wanted}
    await ask(door, response_format={"type": "json_schema", "json_schema": named})
    constraint = door.runner.requests[-1].constraint
    assert isinstance(constraint, JsonSchema)
    assert list(json.loads(constraint.schema).items()) == list(wanted.items())  # in this order, as answers will be


SEVERAL = (
    STARTED,
    TokenDelta("a", (5,), (TokenLogprob(-0.5, ()),), choice=1),
    TokenDelta("b", (6,), (TokenLogprob(-0.25, ()),), choice=0),
    TokenDelta("c", (9,), (TokenLogprob(-0.75, ()),), choice=1),
    dataclasses.replace(FINISHED, choice=1, num_generated_tokens=2, reason=FinishReason.LENGTH, matched_stop=None),
    TokenDelta("d", (), choice=0),
    dataclasses.replace(FINISHED, choice=0, num_generated_tokens=1),
)
"""Chunks of two choices."""


async def test_several_choices_are_told_apart_by_their_index() -> None:
    async with open_door(FakeRunner(SEVERAL)) as door:
        answer = await ask(door, n=2, logprobs=True)
        assert door.runner.requests[0].num_choices == 2
    first, second = answer.choices
    assert [(each.index, each.message.content, each.finish_reason) for each in answer.choices] == [
        (0, "bd", "stop"),
        (1, "ac", "length"),
    ]
    assert [entry.token for entry in first.logprobs.content] == ["<6>"]
    assert [entry.token for entry in second.logprobs.content] == ["<5>", "<9>"]
    # The prompt was read once.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 3, 23)
    assert answer.trimserve["matched_stop"] == "\n"


async def test_streamed_choices_joined_are_the_whole_ones() -> None:
    async with open_door(FakeRunner(SEVERAL)) as door:
        whole = await ask(door, n=2)
        stream = await ask(door, n=2, stream=True, stream_options={"include_usage": True})
        *chunks, usage = [chunk async for chunk in stream]
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
    assert [(texts[i], reasons[i]) for i in (0, 1)] == [(c.message.content, c.finish_reason) for c in whole.choices]
    assert [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role == "assistant"] == [0, 1]
    assert [chunk.trimserve["matched_stop"] for chunk in chunks if chunk.choices[0].finish_reason] == [None, "\n"]
    assert (usage.choices, usage.usage) == ([], whole.usage)


async def test_an_adapter_is_named_as_the_model(door: Door) -> None:
    await door.server._core.backend.load_adapter("birds", None)  # type: ignore[arg-type]  # the fake reads no folder
    answer = await ask(door, model="birds")
    assert (answer.model, door.runner.requests[0].adapter) == ("birds", "birds")
    assert [model.id async for model in door.client.models.list()] == ["fake", "birds"]
    assert (await door.client.models.retrieve("birds")).id == "birds"


FAILURES: list[tuple[Exception, type[openai.APIStatusError], str]] = [
    (InvalidRequest("chat.messages[0].parts[0].image", "broken"), openai.BadRequestError, "INVALID_REQUEST"),
    (UnknownAdapter("gone"), openai.NotFoundError, "ADAPTER_NOT_FOUND"),
    (EngineBusy("full", 2.5), openai.RateLimitError, "QUEUE_FULL"),
    (OutOfMemory("full"), openai.RateLimitError, "OUT_OF_MEMORY"),
    (EngineStopped("draining"), openai.InternalServerError, "ENGINE_STOPPED"),
    (DeadlinePassed("late"), openai.InternalServerError, "DEADLINE_PASSED"),
    (RequestFailed("NaN"), openai.InternalServerError, "REQUEST_FAILED"),
    (ZeroDivisionError("secret"), openai.InternalServerError, "INTERNAL"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "kind", "code"), FAILURES, ids=[code for *_, code in FAILURES])
async def test_an_error_before_the_answer_is_a_status(
    error: Exception, kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    async with open_door(FakeRunner([error])) as door:
        with pytest.raises(kind) as caught:
            await ask(door, stream=stream)
    assert caught.value.code == code
    assert "secret" not in caught.value.message
    if isinstance(error, EngineBusy):
        assert float(caught.value.response.headers["retry-after-ms"]) == error.retry_after_seconds * 1000
    if isinstance(error, InvalidRequest):
        assert caught.value.param == "messages[0].content[0].image_url.url"


async def test_an_error_within_a_stream_ends_it_with_its_reason() -> None:
    async with open_door(FakeRunner([*CHUNKS[:2], RequestFailed("NaN")])) as door:
        with pytest.raises(openai.APIError) as caught:
            _ = [chunk async for chunk in await ask(door, stream=True)]
    assert (caught.value.code, caught.value.type) == ("REQUEST_FAILED", "server_error")


async def test_the_line_of_a_refused_request_says_why_without_its_content(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    with pytest.raises(openai.BadRequestError):
        await ask(door, n=99, user="confidential")
    fields = await line_of("http", caplog)
    assert (fields["status"], fields["reason"], fields["field"]) == (400, "INVALID_REQUEST", "n")
    assert "confidential" not in str(fields)


async def test_an_unknown_model_is_not_found(door: Door) -> None:
    with pytest.raises(openai.NotFoundError, match="must be one of fake, got 'gpt-7'"):
        await ask(door, model="gpt-7")
    with pytest.raises(openai.NotFoundError):
        await door.client.models.retrieve("gpt-7")
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        await door.client.embeddings.create(model="fake", input="x")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    async with open_door(FakeRunner([*CHUNKS[:2], Pause.UNTIL_RELEASED])) as door:
        asking = asyncio.ensure_future(ask(door, stream=stream))
        await soon(door.runner.paused.wait())
        if stream:
            await (await asking).close()
        asking.cancel()
        await soon(door.runner.cancelled.wait())
        assert door.runner.num_running == 0


async def test_a_hundred_streams_lose_nothing(door: Door) -> None:
    async def stream() -> str:
        chunks = await ask(door, stream=True)
        return "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])

    assert await asyncio.gather(*(stream() for _ in range(100))) == [ANSWER] * 100


async def test_a_stop_lets_the_running_finish_and_refuses_the_rest() -> None:
    async with open_door(FakeRunner([*CHUNKS[:2], Pause.UNTIL_RELEASED, *CHUNKS[2:]])) as door:
        asking = asyncio.ensure_future(ask(door))
        await soon(door.runner.paused.wait())
        stopping = asyncio.ensure_future(door.server.stop())
        await asyncio.sleep(0)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            await ask(door)
        door.runner.released.set()
        assert (await asking).choices[0].message.content == ANSWER
        await stopping


async def test_the_request_id_is_the_clients_if_it_has_one(door: Door) -> None:
    answer = await ask(door, extra_headers={"x-request-id": "mine"})
    assert (answer.id, answer._request_id, door.runner.requests[0].request_id) == ("chatcmpl-mine", "mine", "mine")


def test_every_error_has_a_status_through_both_doors() -> None:
    assert http_statuses.STATUS.keys() == grpc_statuses.STATUS.keys()
    assert {http_statuses.status_of(error) for error, *_ in FAILURES} >= {400, 404, 429, 500, 503, 504}


def test_an_error_is_json_whatever_a_client_sent() -> None:
    content = json.loads(json.dumps(http_statuses.error_body(InvalidRequest("a", "\ud800" * 5000), "id")))
    assert len(content["error"]["message"].encode()) <= http_statuses.MAX_MESSAGE_BYTES


GUIDELLM = {"ignore_eos": True, "stop": None, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LMMS_EVAL = {"max_tokens": 16, "temperature": 0, "top_p": 1.0, "seed": 0, "presence_penalty": 0, "n": 1}
OPEN_WEBUI: dict[str, Any] = {
    "metadata": {"chat": "1"},
    "tools": [],
    "tool_choice": "auto",
    "functions": None,
    "user": "me",
}


@pytest.mark.parametrize("fields", [GUIDELLM, LMMS_EVAL, OPEN_WEBUI], ids=["guidellm", "lmms-eval", "open-webui"])
async def test_what_tools_send_is_taken(door: Door, fields: dict[str, object]) -> None:
    chunks = [chunk async for chunk in await ask(door, stream=True, extra_body=fields)]
    assert chunks[0].choices[0].delta.role == "assistant"
