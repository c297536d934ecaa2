"""The embedded model answers the same through both doors."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf.json_format import MessageToDict
from openai import BadRequestError, OpenAI

from trimserve.client import Client, make_request
from trimserve.model.loading import embedded_model_folder
from trimserve.serve import in_process_server
from trimserve.server.running import InProcessServer
from trimserve.v1 import generation_pb2 as pb

PICTURE = embedded_model_folder().parent / "samples/scene.png"
URI = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
QUESTION = "What colour is the star?"
CONTENT = [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": QUESTION}]


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with in_process_server(with_http=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: InProcessServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", [None, 1, 2**64 - 1], ids=["greedy", "seed 1", "the largest seed"])
@pytest.mark.parametrize("with_image", [True, False])
def test_text_over_http_equals_text_over_grpc(
    server: InProcessServer, client: OpenAI, seed: int | None, with_image: bool
) -> None:
    request = make_request(QUESTION, [PICTURE] if with_image else [])
    request.trim.k_ratio = 0.1
    request.sampling.max_new_tokens = 24
    request.sampling.ignore_eos = True
    request.sampling.temperature = 0 if seed is None else 1.5
    request.sampling.num_top_logprobs = 1
    if seed is not None:
        request.sampling.seed = seed
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate(request)
    asked: dict[str, Any] = {
        "model": expected.model_id,
        "messages": [{"role": "user", "content": CONTENT if with_image else QUESTION}],
        "max_completion_tokens": 24,
        "temperature": 0 if seed is None else 1.5,
        "seed": seed,
        "logprobs": True,
        "top_logprobs": 1,
        "extra_body": {"ignore_eos": True, "trimserve": {"trim": {"k_ratio": 0.1}}},
    }
    answer: Any = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert [entry.logprob for entry in choice.logprobs.content] == [each.logprob for each in expected.logprobs]
    assert answer.usage.prompt_tokens == expected.usage.num_prompt_tokens
    assert answer.trimserve["cross_kv_bytes"]["held"] == expected.cross_kv_bytes.held
    chunks: Any = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == expected.text


def test_a_second_look_over_http_is_that_over_grpc(server: InProcessServer, client: OpenAI) -> None:
    request = make_request(QUESTION, [PICTURE], sampling=pb.SamplingParams(temperature=0))
    request.trim.look_again.side_ratio = 0.25
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate(request)
        request.trim.mode = pb.TRIM_MODE_OFF
        with pytest.raises(grpc.RpcError, match=r"trim\.look_again: needs trimming"):
            grpc_client.generate(request)
    asked: Any = {"model": expected.model_id, "messages": [{"role": "user", "content": CONTENT}], "temperature": 0}
    trim = {"look_again": {"side_ratio": 0.25}}
    answer: Any = client.chat.completions.create(**asked, extra_body={"trimserve": {"trim": trim}})
    assert answer.choices[0].message.content == expected.text
    assert answer.trimserve["looked_at"] == MessageToDict(expected.looked_at, always_print_fields_with_no_presence=True)
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**asked, extra_body={"trimserve": {"trim": {**trim, "policy": "mean"}}})
    assert caught.value.param == "trimserve.trim.look_again"


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},  # the embedded model fills its tokens with spaces otherwise
}


def test_choices_of_a_schema_over_http_equal_those_over_grpc(server: InProcessServer, client: OpenAI) -> None:
    request = make_request(QUESTION, [PICTURE], json_schema=SCHEMA, num_choices=3)
    request.sampling.MergeFrom(pb.SamplingParams(temperature=1, seed=3, max_new_tokens=128))
    with Client(server.address) as grpc_client:
        expected = grpc_client.generate(request)
    asked: dict[str, Any] = {
        "model": expected.model_id,
        "messages": [{"role": "user", "content": CONTENT}],
        "temperature": 1,
        "seed": 3,
        "max_completion_tokens": 128,
        "n": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "star", "schema": SCHEMA}},
    }
    answer: Any = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in answer.choices] == [choice.text for choice in expected.choices]
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended
    for choice in ended:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert answer.usage.prompt_tokens == expected.usage.num_prompt_tokens
    assert answer.usage.completion_tokens == sum(each.usage.num_generated_tokens for each in expected.choices)


def test_a_schema_that_cannot_be_met_is_refused_by_its_openai_name(client: OpenAI) -> None:
    (model,) = client.models.list().data
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"type": "blob"}}}
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": QUESTION}], response_format=wanted
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert "blob" in caught.value.message


def test_the_bytes_of_the_tokens_are_the_text(client: OpenAI) -> None:
    (model,) = client.models.list().data
    messages: Any = [{"role": "user", "content": "Hello, grüß dich ☃"}]
    answer = client.chat.completions.create(
        model=model.id, messages=messages, logprobs=True, max_tokens=16, extra_body={"ignore_eos": True}, temperature=2
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    drawn = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content if not entry.token.startswith("<|"))
    assert drawn.decode(errors="replace") == choice.message.content


def test_a_broken_image_is_named_as_openai_does(client: OpenAI) -> None:
    (model,) = client.models.list().data
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages: Any = [{"role": "user", "content": [broken]}]
    with pytest.raises(Exception, match="image") as caught:
        client.chat.completions.create(model=model.id, messages=messages)
    assert caught.value.param == "messages[0].content[0].image_url.url"  # type: ignore[attr-defined]  # of its own
