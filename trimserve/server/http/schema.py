"""OpenAI's published shape of a chat completion request, as far as this server serves it.

Types are checked here, bounds where the contract's are (`server/grpc/convert.py`). A field that is not here is refused
by name, because it could change the answer, unless it is null or empty, or one of those that are known to change
nothing: a client learns at once that the server has no such thing.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from trimserve.errors import InvalidRequest
from trimserve.validation import complaint

__all__ = [
    "ChatRequest",
    "Extension",
    "ImagePart",
    "ImageUrl",
    "JsonSchemaFormat",
    "Message",
    "ResponseFormat",
    "StreamOptions",
    "TextPart",
    "parse",
]

HARMLESS = frozenset(
    {
        *("user", "safety_identifier", "metadata", "store", "service_tier"),  # about the provider's books
        *("prompt_cache_key", "prompt_cache_retention", "prediction"),  # about speed
        *("parallel_tool_calls", "tool_choice"),  # about tools, which are refused
    }
)
"""Fields of a request that change no answer of this server."""

HARMLESS_WITHIN = {"response_format": frozenset({"strict", "name", "description"}), "trimserve": frozenset[str]()}
"""The same of objects in it; how a stream is told, `stream_options`, changes no answer at all."""

MAX_VALUES = 2**18
"""Commas, brackets and braces in a request's JSON, in texts too: what is parsed takes a hundred bytes for each."""

MAX_WRONG = 100
"""Of a body of which one wrong value is told; more are only counted, since each takes about a kilobyte to look at."""

Element = TypeVar("Element")
ListOf = Annotated[list[Element], Field(fail_fast=True)]
"""A list that is refused at its first wrong element."""

Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Uint64 = Annotated[int, Field(ge=0, le=2**64 - 1)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class ImageUrl(_Shape):
    """Where an image is; `detail` changes nothing, all pixels are used."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Shape):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Shape):
    """Text in a message."""

    type: Literal["text"]
    text: str


class _OtherPart(_Shape):
    type: str


TAGS = ("text", "image_url", "other")
"""Kinds of parts."""


def _kind(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if kind in TAGS else "other"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image_url")] | Annotated[_OtherPart, Tag("other")],
    Discriminator(_kind),
]


class Message(_Shape):
    """One turn of a chat; a `name` is not shown to the model."""

    role: str
    content: str | ListOf[Part] | None = None
    name: str | None = None


class StreamOptions(_Shape):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(_Shape):
    """A schema, and what the client calls it; `strict` changes nothing, every answer is valid."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Shape):
    """What an answer must look like; `type` names it."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class Extension(_Shape):
    """What trimserve has beside OpenAI's fields, as object `trimserve`."""

    trim: dict[str, Any] | None = None
    """`TrimOptions` of the contract, in protobuf's JSON."""
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """The request's deadline, from its arrival."""


class ChatRequest(_Shape):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: ListOf[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Uint32 | None = None
    max_tokens: Uint32 | None = None
    max_completion_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Uint32, float] | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None
    seed: Uint64 | None = None
    stop: str | ListOf[str] | None = None
    response_format: ResponseFormat | None = None
    modalities: ListOf[str] | None = None
    # Not OpenAI's, but what other servers of its shape take, under the names that tools use.
    top_k: Uint32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: ListOf[Uint32] | None = None
    trimserve: Extension | None = None


def parse(body: bytes) -> ChatRequest:
    """A request's body.

    Args:
        body: as it came.
    Raises:
        InvalidRequest: it is no JSON, not of this shape, or has a field that could change the answer.
    """
    num_values = sum(body.count(each) for each in (b",", b"[", b"{"))
    if num_values > MAX_VALUES:
        raise InvalidRequest("body", f"must have at most {MAX_VALUES} commas, brackets and braces, got {num_values}")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        if (count := error.error_count()) > MAX_WRONG:
            raise InvalidRequest("body", f"must have at most {MAX_WRONG} values of wrong types, got {count}") from None
        errors = error.errors(include_url=False, include_context=False)
        deepest = max(errors, key=lambda each: len(each["loc"]))  # of a union, the type that was meant
        words = complaint(deepest, is_secret="image_url" in deepest["loc"])
        raise InvalidRequest(_path(deepest["loc"]), words) from None
    _refuse_unknown(request)
    return request


def _refuse_unknown(request: ChatRequest) -> None:
    _check_extra(request, "", HARMLESS)
    for name, harmless in HARMLESS_WITHIN.items():
        if (inner := getattr(request, name)) is not None:
            _check_extra(inner, f"{name}.", harmless)
    for index, message in enumerate(request.messages):
        _check_extra(message, f"messages[{index}].", frozenset({"annotations"}))


def _check_extra(shape: BaseModel, path: str, harmless: frozenset[str]) -> None:
    for name, value in (shape.model_extra or {}).items():
        is_empty = value is None or value in ([], {}, "")
        if not is_empty and name not in harmless:
            raise InvalidRequest(f"{path}{name[:64]}", "is not supported by this server, and could change the answer")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[1].content[0].text` of a place that pydantic names, without the types that it tried there."""
    path = ""
    for before, each in zip((None, *location), location, strict=False):
        if isinstance(each, int):
            path += f"[{each}]"
        elif not (each in ("str", "[key]") or each.startswith("list[") or (isinstance(before, int) and each in TAGS)):
            path += f".{each[:64]}" if path else each[:64]
    return path or "body"
