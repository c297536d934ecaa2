"""Fields of a chat completion that are refused, each by the name that OpenAI gives it."""

import openai
import pytest

from tests.server.http.conftest import Door, ask


def part(content: object) -> dict[str, object]:
    """Fields with a message of one part."""
    return {"messages": [{"role": "user", "content": [content]}]}


def url(address: object) -> dict[str, object]:
    """Fields with an image."""
    return part({"type": "image_url", "image_url": {"url": address}})


def format_of(schema: object) -> dict[str, object]:
    """A format of JSON."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def schema(wanted: object) -> dict[str, object]:
    """Fields that ask for JSON."""
    return {"response_format": format_of(wanted)}


REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    (part({"type": "input_audio"}), "messages[0].content[0].type", "input_audio"),
    (part({"type": "text", "text": 5}), "messages[0].content[0].text", "valid string, got 5"),
    (url("https://example.com/cat.png"), "messages[0].content[0].image_url.url", "no address is fetched"),
    (url("file:///etc/passwd"), "messages[0].content[0].image_url.url", "no address is fetched"),
    (url("data:image/png;base64,?"), "messages[0].content[0].image_url.url", "base64"),
    (url("data:image/png;base64,"), "messages[0].content[0].image_url.url", "bytes"),
    (url("data:image/png;base64," + "AAAA" * 400), "messages[0].content[0].image_url.url", "1000 bytes"),
    ({"temperature": -1}, "temperature", "[0, 100]"),
    ({"temperature": "hot"}, "temperature", "number, got 'hot'"),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"max_tokens": 0}, "max_completion_tokens", "[1, 128]"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "1 and 2"),
    ({"n": 17}, "n", "[1, 16]"),
    ({"n": -1}, "n", "greater than or equal to 0, got -1"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"logit_bias": {"1000": 1}}, "logit_bias[1000]", "[0, 999]"),
    ({"stop": ["x", 1, *[2] * 1000]}, "stop[1]", "valid string, got 1"),
    (
        {"logit_bias": {f"cat{number}": 1 for number in range(101)}},
        "body",
        "at most 100 values of wrong types, got 101",
    ),
    ({"logit_bias": {"cat": 1}}, "logit_bias.cat", "integer, got 'cat'"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object, json_schema, got 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "got none"),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        "response_format.schema",
        "not supported",
    ),
    ({"response_format": {**format_of({}), "type": "json_object"}}, "response_format.json_schema", "unless type is"),
    (schema(None), "response_format.json_schema.schema", "got none"),
    (schema("{}"), "response_format.json_schema.schema", "should be an object, got '{}'"),
    ({"trimserve": [1]}, "trimserve", "an object, got a list of 1"),
    ({"logprobs": None, "stop": {"a": 1}}, "stop", "got an object of 1"),
    (schema({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "65536 bytes"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "audio"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    ({"guided_regex": "a*"}, "guided_regex", "not supported"),
    ({"trimserve": {"trim": {"k_ratio": 2}}}, "trimserve.trim.k_ratio", "(0, 1]"),
    ({"trimserve": {"trim": {"k": 2}}}, "trimserve.trim", "no field named"),
    ({"trimserve": {"trim": {"policy": "best"}}}, "trimserve.trim.policy", "must be one of"),
    ({"trimserve": {"k_ratio": 0.2}}, "trimserve.k_ratio", "not supported"),
    ({"trimserve": {"priority": 1001}}, "trimserve.priority", "[-1000, 1000]"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[f"{param}-{words}" for _, param, words in REFUSED])
async def test_what_is_wrong_is_refused_by_its_openai_name(
    door: Door, fields: dict[str, object], param: str, words: str
) -> None:
    own = {name: value for name, value in fields.items() if name == "messages"}
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(door, **own, extra_body={name: value for name, value in fields.items() if name not in own})
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        param,
        "INVALID_REQUEST",
        "invalid_request_error",
    )
    assert words in caught.value.message
    assert not door.runner.requests


async def test_what_changes_no_answer_is_let_through(door: Door) -> None:
    await ask(door, extra_body={**schema({"type": "string"}), "user": "me", "stream": False})
    await ask(door, extra_body={"response_format": {**format_of({"type": "string"}), "strict": True}})
    assert len(door.runner.requests) == 2


async def test_what_was_got_is_shortened_and_of_an_image_not_told(door: Door) -> None:
    for field, value, words in (
        ("temperature", "x" * 10_000, f"got '{'x' * 80}'..."),
        ("stop", 10**1000, "got 1" + "0" * 79),
        ("messages", part({"type": "image_url", "image_url": "data:image/png;base64,iVBOR"})["messages"], "an object"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(door, extra_body={field: value})
        assert str(caught.value.body["message"]).endswith(words)  # type: ignore[index]  # OpenAI's error object
