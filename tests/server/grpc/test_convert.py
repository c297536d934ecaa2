"""From the wire to the engine: every bound, once here and once over the wire; every default."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2

from tests.server.conftest import Loopback, rich_status
from tests.server.fakes import DEFAULTS, chat_request, converted
from trimserve.api.constraint import MAX_CHOICES, Choice, JsonObject, JsonSchema, LarkGrammar, Regex
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, RawPrompt, Text, TokenPrompt
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.errors import InvalidRequest
from trimserve.trimming.policies.table import POLICIES
from trimserve.v1 import generation_pb2 as pb

NAN, INF = float("nan"), float("inf")
USER = pb.ROLE_USER


@dataclass(frozen=True)
class Bad:
    """One field out of bounds, and what the error must say."""

    field: str
    bound: str
    request: pb.GenerateRequest

    def __str__(self) -> str:
        return f"{self.field}: {self.bound}"


def sampling(field: str, bound: str, **fields: object) -> Bad:
    request = chat_request()
    request.sampling.CopyFrom(pb.SamplingParams(**fields))  # type: ignore[arg-type]  # fields of every type
    return Bad(f"sampling.{field}", bound, request)


def trim(field: str, bound: str, **fields: object) -> Bad:
    request = chat_request()
    request.trim.CopyFrom(pb.TrimOptions(**fields))  # type: ignore[arg-type]  # fields of every type
    return Bad(f"trim.{field}", bound, request)


def chat(field: str, bound: str, *messages: pb.Message) -> Bad:
    return Bad(f"chat.messages{field}", bound, pb.GenerateRequest(chat=pb.Chat(messages=messages)))


def top(field: str, bound: str, **fields: object) -> Bad:
    return Bad(field, bound, pb.GenerateRequest(**fields))  # type: ignore[arg-type]  # fields of every type


def parts(*parts: pb.Part) -> pb.Message:
    return pb.Message(role=USER, parts=parts)


def image(size: int) -> pb.Part:
    return pb.Part(image=pb.Image(data=b"x" * size))


TEXT = pb.Part(text="a")
NO_ROLE = cast("pb.Role", 9)
CHAT = chat_request().chat

BAD = [
    top("prompt", "one of chat, raw_prompt and prompt_token_ids, got none"),
    top("request_id", "at most 128 of A-Z a-z 0-9 . _ : and -, got 129", chat=CHAT, request_id="x" * 129),
    top("request_id", "starting 'a b'", chat=CHAT, request_id="a b"),
    top("request_id", "starting 'a\\n'", chat=CHAT, request_id="a\n"),
    top("num_choices", "[1, 16], got 0", chat=CHAT, num_choices=0),
    top("num_choices", "[1, 16], got 17", chat=CHAT, num_choices=17),
    top("priority", "[-1000, 1000], got 1001", chat=CHAT, priority=1001),
    top("priority", "[-1000, 1000], got -1001", chat=CHAT, priority=-1001),
    top("images", "empty beside chat, whose images are message parts, got 1", chat=CHAT, images=[pb.Image()]),
    top("raw_prompt", "must not be empty", raw_prompt=""),
    top("images", "at most 3 images, got 4", raw_prompt="a", images=[pb.Image(data=b"x")] * 4),
    top("images[1].data", "1 to 1000 bytes, got 0", raw_prompt="a", images=[pb.Image(data=b"x"), pb.Image()]),
    top("images[0].data", "1 to 1000 bytes, got 1001", raw_prompt="a", images=[pb.Image(data=b"x" * 1001)]),
    top("prompt_token_ids.token_ids", "1 to 128 ids, got 0", prompt_token_ids=pb.TokenIds()),
    top(
        "prompt_token_ids.token_ids",
        "1 to 128 ids, got 129",
        prompt_token_ids=pb.TokenIds(token_ids=[1] * 129),
    ),
    top(
        "prompt_token_ids.token_ids[1]",
        "[0, 999], got 1001",
        prompt_token_ids=pb.TokenIds(token_ids=[1, 1001]),
    ),
    chat("", "at least 1 message, got 0"),
    chat("", "at most 4096 messages, got 4097", *[parts(TEXT)] * 4097),
    chat("", "at most 4096 parts in all, got 4098", *[parts(TEXT, TEXT)] * 2049),
    chat("", "at most 3 images in all, got 4", parts(image(1), image(1)), parts(image(1), image(1))),
    chat("[0].role", "ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, got 0", pb.Message(parts=[TEXT])),
    chat("[1].role", "ROLE_ASSISTANT, got 9", parts(TEXT), pb.Message(role=NO_ROLE, parts=[TEXT])),
    chat("[0].parts", "at least 1 part, got 0", parts()),
    chat("[0].parts[1]", "one of text and image, got neither", parts(TEXT, pb.Part())),
    chat("[0].parts[0].image.data", "1 to 1000 bytes, got 0", parts(image(0))),
    chat("[0].parts[1].image.data", "1 to 1000 bytes, got 1001", parts(TEXT, image(1001))),
    sampling("max_new_tokens", "[1, 128], got 0", max_new_tokens=0),
    sampling("max_new_tokens", "[1, 128], got 129", max_new_tokens=129),
    sampling("min_new_tokens", "[0, 5], got 6", max_new_tokens=5, min_new_tokens=6),
    sampling("min_new_tokens", "[0, 32], got 33", min_new_tokens=33),
    *(sampling("temperature", f"[0, 100], got {value}", temperature=value) for value in (-0.1, 100.1, NAN, INF, -INF)),
    *(sampling("top_p", f"(0, 1], got {value}", top_p=value) for value in (0.0, 1.1, NAN, INF)),
    *(sampling("min_p", f"[0, 1], got {value}", min_p=value) for value in (-0.1, 1.1, NAN)),
    *(
        sampling("repetition_penalty", f"[0.01, 100], got {value}", repetition_penalty=value)
        for value in (0.0, 1e-40, 0.0099, 100.5, NAN, INF)
    ),
    *(sampling("presence_penalty", f"[-2, 2], got {value}", presence_penalty=value) for value in (-2.1, 2.1, NAN, INF)),
    *(
        sampling("frequency_penalty", f"[-2, 2], got {value}", frequency_penalty=value)
        for value in (-2.1, 2.1, NAN, INF)
    ),
    sampling("logit_bias[1000]", "[0, 999], got 1000", logit_bias={1000: 1.0}),
    *(
        sampling("logit_bias[7]", f"[-100, 100], got {value}", logit_bias={3: 1.0, 7: value})
        for value in (-100.5, 100.5, NAN, -INF)
    ),
    sampling("logit_bias", "at most 1024 ids, got 1025", logit_bias=dict.fromkeys(range(1025), 1.0)),
    sampling("stop_strings", "at most 16 strings, got 17", stop_strings=["a"] * 17),
    sampling("stop_strings[1]", "1 to 256 characters, got 0", stop_strings=["a", ""]),
    sampling("stop_strings[0]", "1 to 256 characters, got 257", stop_strings=["a" * 257]),
    sampling("stop_token_ids", "at most 64 ids, got 65", stop_token_ids=[1] * 65),
    sampling("stop_token_ids[1]", "[0, 999], got 1000", stop_token_ids=[999, 1000]),
    sampling("num_top_logprobs", "[0, 20], got 21", num_top_logprobs=21),
    trim("mode", "TRIM_MODE_OFF, got 7", mode=7),
    trim("policy", f"one of {', '.join(POLICIES)}, got 'best'", policy="best"),
    trim(
        "budget",
        "'divprune' takes (ratio, count), got knee",
        policy="divprune",
        budget=pb.Budget(knee=pb.Knee()),
    ),
    trim("budget", "policy 'pool' takes (none), got ratio", policy="pool", budget=pb.Budget(ratio=0.5)),
    *(trim("budget.ratio", f"(0, 1], got {value}", budget=pb.Budget(ratio=value)) for value in (0.0, 1.5, NAN)),
    *(trim("budget.top_p", f"(0, 1], got {value}", budget=pb.Budget(top_p=value)) for value in (0.0, 1.5, NAN)),
    trim("budget.count", "[1, 4294967295], got 0", budget=pb.Budget(count=0)),
    trim("parameters.hops", "of policy 'mmr' (relevance_weight)", policy="mmr", parameters=pb.PolicyParameters(hops=2)),
    trim("parameters.hops", "of policy 'trimmed' (none)", parameters=pb.PolicyParameters(hops=2)),
    trim("parameters.hops", "[1, 64], got 65", policy="gprune", parameters=pb.PolicyParameters(hops=65)),
    trim("parameters.temperature", "(0, 10], got 0", policy="gprune", parameters=pb.PolicyParameters(temperature=0)),
    *(trim("k_ratio", f"(0, 1], got {value}", k_ratio=value) for value in (0.0, -0.5, 1.5, NAN, INF)),
    *(trim("merge_ratio", f"[0, 1], got {value}", merge_ratio=value) for value in (-0.1, 1.5, NAN, INF)),
    *(trim("max_kept_fraction", f"(0, 1], got {value}", max_kept_fraction=value) for value in (0.0, 1.5, NAN, INF)),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_field_is_named_with_its_bound_and_value(bad: Bad) -> None:
    with pytest.raises(InvalidRequest) as caught:
        converted(bad.request)
    assert caught.value.field == bad.field
    assert bad.bound in caught.value.message


async def test_every_bad_field_arrives_as_a_violation_and_the_server_answers_the_next_request(
    loopback: Loopback,
) -> None:
    for bad in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await loopback.generation.Generate(bad.request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, bad
        assert bad.bound in (caught.value.details() or ""), bad
        request = error_details_pb2.BadRequest()
        assert any(detail.Unpack(request) for detail in rich_status(caught.value).details), bad
        (violation,) = request.field_violations
        assert violation.field == bad.field
        assert bad.bound in violation.description, bad
        answer = await loopback.generation.Generate(chat_request())
        assert answer.text, bad


def test_unset_fields_mean_the_checkpoints_defaults() -> None:
    request = converted(chat_request())
    assert request.sampling == SamplingParams(
        max_new_tokens=None,
        temperature=DEFAULTS.temperature,
        top_p=DEFAULTS.top_p,
        top_k=DEFAULTS.top_k,
        min_p=DEFAULTS.min_p,
        repetition_penalty=DEFAULTS.repetition_penalty,
        seed=request.sampling.seed,
    )
    assert request.trim == TrimRequest(enabled=True, policy="trimmed", k_ratio=0.2, merge_ratio=0.25)
    assert (request.num_choices, request.priority) == (1, 0)


def test_zero_is_a_value_and_not_a_default() -> None:
    request = chat_request()
    zeros = pb.SamplingParams(temperature=0, top_k=0, min_p=0, seed=0, num_top_logprobs=0)
    request.sampling.CopyFrom(zeros)
    params = converted(request).sampling
    assert (params.temperature, params.top_k, params.min_p, params.seed) == (0, 0, 0, 0)
    assert params.num_top_logprobs == 0
    request.trim.merge_ratio = 0
    assert converted(request).trim.merge_ratio == 0


def test_set_fields_arrive_unchanged() -> None:
    numbers: dict[str, Any] = {
        "max_new_tokens": 128,
        "min_new_tokens": 3,
        "ignore_eos": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 2**32 - 1,
        "min_p": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {0: -100.0, 999: 100.0},
        "seed": 2**64 - 1,
        "num_top_logprobs": 20,
    }
    stops: dict[str, Any] = {"stop_strings": ("\n", "a" * 256), "stop_token_ids": (0, 999)}
    request = chat_request()
    request.request_id, request.priority, request.num_choices = "a.b_c:1-2", -7, 16
    request.sampling.CopyFrom(pb.SamplingParams(**numbers, **stops))
    request.trim.CopyFrom(
        pb.TrimOptions(
            mode=pb.TRIM_MODE_OFF,
            policy="random",
            k_ratio=0.3,
            max_kept_fraction=1.0,
            merge_ratio=1.0,
            return_selection=True,
        )
    )
    got = converted(request)
    assert (got.request_id, got.priority, got.num_choices) == ("a.b_c:1-2", -7, 16)
    assert got.sampling == SamplingParams(**numbers, **stops)
    assert got.trim == TrimRequest(
        enabled=False, policy="random", k_ratio=0.3, max_kept_fraction=1.0, merge_ratio=1.0, return_selection=True
    )


def test_an_unset_seed_is_drawn_anew() -> None:
    seeds = {converted(chat_request()).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert max(seeds) >= 2**48  # all 64 bits are drawn


def test_chat_keeps_roles_and_the_order_of_parts() -> None:
    messages = [
        pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="be kind")]),
        parts(image(3), pb.Part(text=""), image(5)),
        pb.Message(role=pb.ROLE_ASSISTANT, parts=[TEXT]),
    ]
    prompt = converted(pb.GenerateRequest(chat=pb.Chat(messages=messages))).prompt
    assert prompt == ChatPrompt(
        (
            Message("system", (Text("be kind"),)),
            Message("user", (ImageFile(b"xxx"), Text(""), ImageFile(b"xxxxx"))),
            Message("assistant", (Text("a"),)),
        )
    )
    files = [part for message in prompt.messages for part in message.parts if isinstance(part, ImageFile)]
    assert [file.field for file in files] == ["chat.messages[1].parts[0].image", "chat.messages[1].parts[2].image"]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"raw_prompt": "<|image|>?"}, lambda images: RawPrompt("<|image|>?", images)),
        (
            {"prompt_token_ids": pb.TokenIds(token_ids=[0, 999, 1000])},
            lambda images: TokenPrompt((0, 999, 1000), images),
        ),
    ],
    ids=["raw", "token ids"],
)
def test_raw_and_token_prompts_take_their_images_from_the_request(
    fields: dict[str, object], prompt: Callable[[tuple[ImageFile, ...]], RawPrompt | TokenPrompt]
) -> None:
    images = [pb.Image(data=b"x", mime_type="image/png")]
    request = pb.GenerateRequest(images=images, **fields)  # type: ignore[arg-type]  # fields of every type
    wanted = prompt((ImageFile(b"x"),))
    got = converted(request).prompt
    assert got == wanted
    assert [image.field for image in got.images] == ["images[0]"]


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, None),
        ({"json_schema": "{}"}, JsonSchema("{}")),
        ({"json_object": pb.JsonObject()}, JsonObject()),
        ({"regex": "a+"}, Regex("a+")),
        ({"choice": pb.ChoiceConstraint(options=["yes", "no"])}, Choice(("yes", "no"))),
        ({"grammar": 'start: "a"'}, LarkGrammar('start: "a"')),
    ],
)
def test_a_constraint_arrives_as_it_was_sent(fields: dict[str, object], constraint: object) -> None:
    request = chat_request()
    request.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]  # fields of every type
    assert converted(request).constraint == constraint


@pytest.mark.parametrize(
    ("fields", "field", "bound"),
    [
        ({"json_schema": ""}, "json_schema", "1 to 65536 bytes, got 0"),
        ({"json_schema": "é" * 40_000}, "json_schema", "1 to 65536 bytes, got 80000"),
        ({"regex": "a" * 8193}, "regex", "1 to 8192 bytes, got 8193"),
        ({"grammar": "a" * 8193}, "grammar", "1 to 8192 bytes, got 8193"),
        ({"choice": pb.ChoiceConstraint()}, "choice.options", "1 to 1024 options, got 0"),
        (
            {"choice": pb.ChoiceConstraint(options=["a"] * (MAX_CHOICES + 1))},
            "choice.options",
            "1 to 1024 options, got 1025",
        ),
        ({"choice": pb.ChoiceConstraint(options=["a", ""])}, "choice.options[1]", "1 to 65536 characters, got 0"),
        (
            {"choice": pb.ChoiceConstraint(options=["a" * 40_000, "b" * 40_000])},
            "choice.options",
            "65536 bytes in all, got 80000",
        ),
    ],
)
def test_a_constraint_out_of_bounds_is_refused(fields: dict[str, object], field: str, bound: str) -> None:
    request = chat_request()
    request.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]  # fields of every type
    with pytest.raises(InvalidRequest) as refused:
        converted(request)
    assert refused.value.field == field
    assert bound in refused.value.message
