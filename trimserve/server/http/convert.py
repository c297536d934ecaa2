"""From a chat completion request to the contract's `GenerateRequest`, and from its fields' names back to OpenAI's.

The contract's conversion then checks the bounds, so that a request means the same, and is refused for the same reasons,
through both doors.
"""

import binascii
import json
import re
from collections.abc import Collection

from google.protobuf.json_format import ParseDict, ParseError

from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig
from trimserve.errors import InvalidRequest, UnknownAdapter
from trimserve.server.grpc.convert import to_generation_request
from trimserve.server.http.schema import ChatRequest, Extension, ImagePart, Message, ResponseFormat, TextPart
from trimserve.v1 import generation_pb2 as pb

__all__ = ["convert", "openai_error"]

ROLES = {"system": pb.ROLE_SYSTEM, "developer": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}

DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII | re.IGNORECASE)
"""What comes before an image's bytes; what they are is read from themselves."""

_SKIPPED = b" \t\r\n\f\v"
"""Within base64, as browsers do: some encoders write lines."""

SAME_NAMES = (
    *("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "ignore_eos"),
)
"""Fields that `SamplingParams` calls as OpenAI, or its other imitators, do."""

OPENAI_NAMES = (
    (
        re.compile(r"^chat\.messages\[(\d+)\]\.parts\[(\d+)\]\.image(\.data)?"),
        r"messages[\1].content[\2].image_url.url",
    ),
    (re.compile(r"^chat\.messages\[(\d+)\]\.parts"), r"messages[\1].content"),
    (re.compile(r"^chat\."), ""),
    (re.compile(r"^sampling\.max_new_tokens"), "max_completion_tokens"),
    (re.compile(r"^sampling\.min_new_tokens"), "min_tokens"),
    (re.compile(r"^sampling\.stop_strings"), "stop"),
    (re.compile(r"^sampling\.num_top_logprobs"), "top_logprobs"),
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^(trim|priority)\b"), r"trimserve.\1"),
    (re.compile(r"^adapter"), "model"),
    (re.compile(r"^num_choices"), "n"),
    (re.compile(r"^json_schema"), "response_format.json_schema.schema"),
    (re.compile(r"^json_object"), "response_format.type"),
)
"""The contract's fields as a client of this door knows them; the first that fits."""


def convert(
    request: ChatRequest, request_id: str, adapters: Collection[str], info: ModelInfo, config: EngineConfig
) -> GenerationRequest:
    """Check a request and fill in its defaults.

    Args:
        request: of the right shape.
        request_id: a valid one.
        adapters: names of those that are loaded, which may stand for the model.
        info: limits and defaults of the model.
        config: limits of the engine.
    Raises:
        InvalidRequest: a field is out of bounds, or asks for what there is not; named as OpenAI does.
        UnknownAdapter: there is no such model.
    """
    if request.model != info.model_id and request.model not in adapters:
        known = ", ".join((info.model_id, *adapters))
        raise UnknownAdapter(f"model: must be one of {known}, got {request.model[:64]!r}")
    _refuse_what_there_is_not(request)
    message = pb.GenerateRequest(request_id=request_id, sampling=_sampling(request), num_choices=request.n)
    if request.model != info.model_id:
        message.adapter = request.model
    for index, each in enumerate(request.messages):
        _add_message(message.chat, each, f"messages[{index}]")
    if not request.messages:
        raise InvalidRequest("messages", "must have at least 1 message, got 0")
    if request.response_format is not None:
        _constrain(message, request.response_format)
    if request.trimserve is not None:
        _extend(message, request.trimserve)
    try:
        return to_generation_request(message, info, config)
    except InvalidRequest as error:
        raise openai_error(error) from None


def openai_error(error: InvalidRequest) -> InvalidRequest:
    """The same error, with the field as OpenAI names it."""
    for pattern, name in OPENAI_NAMES:
        field, num_changes = pattern.subn(name, error.field)
        if num_changes:
            return InvalidRequest(field, error.message)
    return error


def _refuse_what_there_is_not(request: ChatRequest) -> None:
    if request.modalities not in (None, [], ["text"]):
        raise InvalidRequest("modalities", f"must be ['text'], got {request.modalities[:4]}")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options", "must be unset unless stream is true")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs", f"must be unset unless logprobs is true, got {request.top_logprobs}")


def _sampling(request: ChatRequest) -> pb.SamplingParams:
    sampling = pb.SamplingParams(min_new_tokens=request.min_tokens or 0, stop_token_ids=request.stop_token_ids or ())
    for name in SAME_NAMES:
        if (value := getattr(request, name)) is not None:
            setattr(sampling, name, value)
    if (most := _max_new_tokens(request)) is not None:
        sampling.max_new_tokens = most
    if request.logprobs:
        sampling.num_top_logprobs = request.top_logprobs or 0
    for token_id, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[token_id] = bias
    stop = request.stop or ()
    sampling.stop_strings.extend([stop] if isinstance(stop, str) else stop)
    return sampling


def _max_new_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens", f"must be unset beside max_completion_tokens, or equal, got {old} and {new}")
    return old if new is None else new


def _add_message(chat: pb.Chat, message: Message, path: str) -> None:
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{path}.role", f"must be one of {known}, got {message.role[:64]!r}")
    if message.content is None:
        raise InvalidRequest(f"{path}.content", "must be text or a list of parts, got null")
    added = chat.messages.add(role=ROLES[message.role])
    if isinstance(message.content, str):
        added.parts.add(text=message.content)
        return
    for index, part in enumerate(message.content):
        field = f"{path}.content[{index}]"
        match part:
            case TextPart():
                added.parts.add(text=part.text)
            case ImagePart():
                added.parts.add().image.data = _image(part.image_url.url, f"{field}.image_url.url")
            case _:
                raise InvalidRequest(f"{field}.type", f"must be text or image_url, got {part.type[:64]!r}")


def _image(url: str, field: str) -> bytes:
    begin = DATA_URI.match(url)
    if begin is None:
        # Fetching what a client names would let it reach whatever this machine reaches.
        raise InvalidRequest(field, f"must be data:image/...;base64,... (no address is fetched), got {url[:64]!r}")
    text = url[begin.end() :].encode("ascii", "replace").translate(None, _SKIPPED)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise InvalidRequest(field, f"must be valid base64: {error}") from None


def _constrain(message: pb.GenerateRequest, wanted: ResponseFormat) -> None:
    if wanted.json_schema is not None and wanted.type in ("text", "json_object"):
        raise InvalidRequest(
            "response_format.json_schema", f"must be unset unless type is json_schema, got {wanted.type}"
        )
    match wanted.type:
        case "text":
            pass
        case "json_object":
            message.json_object.SetInParent()
        case "json_schema":
            schema = None if wanted.json_schema is None else wanted.json_schema.schema_
            if schema is None:
                raise InvalidRequest("response_format.json_schema.schema", "must be a JSON Schema, got none")
            message.json_schema = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        case kind:
            known = "text, json_object, json_schema"
            raise InvalidRequest("response_format.type", f"must be one of {known}, got {kind[:64]!r}")


def _extend(message: pb.GenerateRequest, extension: Extension) -> None:
    if extension.priority is not None:
        message.priority = extension.priority
    try:
        ParseDict(extension.trim or {}, message.trim)
    except ParseError as error:
        raise InvalidRequest("trimserve.trim", " ".join(str(error).split())) from None
