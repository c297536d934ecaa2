"""From `GenerateRequest` to `GenerationRequest`: fills in defaults and checks bounds.

What needs the tokenizer or the pixels (image content, image count against the prompt, prompt length) is checked by
`model/processor.py`.
"""

import secrets
import uuid
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from trimserve.api.adapter import ADAPTER_NAME, ADAPTER_NAME_RULE
from trimserve.api.bounds import (
    BOUNDS,
    MAX_LOGIT_BIASES,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    REQUEST_ID,
    Interval,
)
from trimserve.api.constraint import (
    MAX_CHOICES,
    MAX_CONSTRAINT_BYTES,
    MAX_EXPRESSION_BYTES,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from trimserve.api.info import ModelInfo, PolicyInfo
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Part, Prompt, RawPrompt, Text, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, LookAgain, TopP, TrimRequest
from trimserve.config import EngineConfig
from trimserve.errors import InvalidRequest
from trimserve.v1 import generation_pb2 as pb

__all__ = ["adapter_name", "adopt_request_id", "to_generation_request"]

ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}

TRIM_MODES = {pb.TRIM_MODE_UNSPECIFIED: True, pb.TRIM_MODE_ON: True, pb.TRIM_MODE_OFF: False}


def adopt_request_id(request: ProtoMessage | None, fallback: str = "") -> str:
    """The id under which a call is logged and answered; an empty `request_id` is filled in.

    An id that `to_generation_request` will refuse is not repeated in logs; the call gets another one.

    Args:
        request: of any RPC, of which only `GenerateRequest` has an id; None while it has not been read.
        fallback: id of a call whose request has none; ignored if it is not valid.
    """
    wanted = request.request_id if isinstance(request, pb.GenerateRequest) else ""
    if REQUEST_ID.fullmatch(wanted):
        return wanted
    request_id = fallback if REQUEST_ID.fullmatch(fallback) else uuid.uuid4().hex
    if isinstance(request, pb.GenerateRequest) and not wanted:
        request.request_id = request_id
    return request_id


def to_generation_request(request: pb.GenerateRequest, info: ModelInfo, config: EngineConfig) -> GenerationRequest:
    """Check a request and fill in its defaults.

    Args:
        request: as received.
        info: limits and defaults of the model.
        config: limits of the engine.
    Raises:
        InvalidRequest: a field is missing or out of bounds.
    """
    if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest(
            "request_id",
            f"must be at most {MAX_REQUEST_ID_CHARS} of A-Z a-z 0-9 . _ : and -, got "
            f"{len(request.request_id)} characters starting {request.request_id[:16]!r}",
        )
    return GenerationRequest(
        request_id=request.request_id or uuid.uuid4().hex,
        prompt=_prompt(request, info, config),
        sampling=_sampling(request.sampling, info),
        trim=_trim(request.trim, info),
        num_choices=_optional(request, "num_choices", "", 1),
        priority=_number(request, "priority", path=""),
        adapter=adapter_name("adapter", request.adapter) if request.adapter else None,
        constraint=_constraint(request),
    )


def adapter_name(field: str, name: str) -> str:
    """The name of an adapter that a request gives in a field.

    Raises:
        InvalidRequest: no adapter can have it.
    """
    if not ADAPTER_NAME.fullmatch(name):
        got = f"{len(name)} characters starting {name[:16]!r}"
        raise InvalidRequest(field, f"must be {ADAPTER_NAME_RULE}, got {got}")
    return name


def _number(message: ProtoMessage, name: str, path: str) -> Any:
    """A scalar within its `BOUNDS`."""
    field, value = path + name, getattr(message, name)
    _check(field, value, BOUNDS[field])
    return value


def _optional(message: ProtoMessage, name: str, path: str, default: Any) -> Any:
    """The same for an `optional` scalar; `default`, unchecked, if it is not set."""
    return _number(message, name, path) if message.HasField(name) else default


def _check(field: str, value: float, bounds: Interval) -> None:
    if value not in bounds:
        raise InvalidRequest(field, f"must be in {bounds}, got {value}")


def _check_count(field: str, count: int, what: str, *, least: int = 0, most: int) -> None:
    if not least <= count <= most:
        wanted = f"{least} to {most}" if least else f"at most {most}"
        raise InvalidRequest(field, f"must have {wanted} {what}, got {count}")


def _prompt(request: pb.GenerateRequest, info: ModelInfo, config: EngineConfig) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "must be one of chat, raw_prompt and prompt_token_ids, got none")
    if kind == "chat":
        if request.images:
            raise InvalidRequest(
                "images",
                f"must be empty beside chat, whose images are message parts, got {len(request.images)}",
            )
        return _chat(request.chat, info, config)
    _check_count("images", len(request.images), "images", most=info.max_images)
    images = tuple(
        _image(image, f"images[{index}]", config.max_image_bytes) for index, image in enumerate(request.images)
    )
    if kind == "raw_prompt":
        if not request.raw_prompt:
            raise InvalidRequest("raw_prompt", "must not be empty")
        return RawPrompt(request.raw_prompt, images)
    ids = request.prompt_token_ids.token_ids
    _check_count("prompt_token_ids.token_ids", len(ids), "ids", least=1, most=info.max_model_len)
    token_ids = tuple(ids)
    _check_token_ids("prompt_token_ids.token_ids", token_ids, info, may_be_image=True)
    return TokenPrompt(token_ids, images)


def _chat(chat: pb.Chat, info: ModelInfo, config: EngineConfig) -> ChatPrompt:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must have at least 1 message, got 0")
    _check_count("chat.messages", len(chat.messages), "messages", most=MAX_MESSAGES)
    num_parts = sum(len(message.parts) for message in chat.messages)
    _check_count("chat.messages", num_parts, "parts in all", most=MAX_PARTS)
    num_images = sum(part.WhichOneof("content") == "image" for message in chat.messages for part in message.parts)
    _check_count("chat.messages", num_images, "images in all", most=info.max_images)
    messages = tuple(
        _message(message, f"chat.messages[{index}]", config) for index, message in enumerate(chat.messages)
    )
    return ChatPrompt(messages)


def _message(message: pb.Message, path: str, config: EngineConfig) -> Message:
    if message.role not in ROLES:
        known = ", ".join(pb.Role.Name(role) for role in ROLES)
        raise InvalidRequest(f"{path}.role", f"must be one of {known}, got {message.role}")
    if not message.parts:
        raise InvalidRequest(f"{path}.parts", "must have at least 1 part, got 0")
    return Message(
        ROLES[message.role],
        tuple(_part(part, f"{path}.parts[{index}]", config) for index, part in enumerate(message.parts)),
    )


def _part(part: pb.Part, path: str, config: EngineConfig) -> Part:
    match part.WhichOneof("content"):
        case "text":
            return Text(part.text)
        case "image":
            return _image(part.image, f"{path}.image", config.max_image_bytes)
        case _:
            raise InvalidRequest(path, "must be one of text and image, got neither")


def _image(image: pb.Image, path: str, max_bytes: int) -> ImageFile:
    data = image.data  # each look at it is a copy
    _check_count(f"{path}.data", len(data), "bytes", least=1, most=max_bytes)
    return ImageFile(data, path)


def _sampling(sampling: pb.SamplingParams, info: ModelInfo) -> SamplingParams:
    path = "sampling."
    defaults = info.generation_defaults
    max_new_tokens, min_new_tokens = _token_counts(sampling, info)
    _check_count("sampling.stop_token_ids", len(sampling.stop_token_ids), "ids", most=MAX_STOP_TOKENS)
    _check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, info)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos=sampling.ignore_eos,
        temperature=_optional(sampling, "temperature", path, defaults.temperature),
        top_p=_optional(sampling, "top_p", path, defaults.top_p),
        top_k=sampling.top_k if sampling.HasField("top_k") else defaults.top_k,
        min_p=_optional(sampling, "min_p", path, defaults.min_p),
        repetition_penalty=_optional(sampling, "repetition_penalty", path, defaults.repetition_penalty),
        presence_penalty=_number(sampling, "presence_penalty", path),
        frequency_penalty=_number(sampling, "frequency_penalty", path),
        logit_bias=_logit_bias(sampling, info),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        stop_strings=_stop_strings(sampling.stop_strings),
        stop_token_ids=tuple(sampling.stop_token_ids),
        num_top_logprobs=_optional(sampling, "num_top_logprobs", path, None),
    )


def _token_counts(sampling: pb.SamplingParams, info: ModelInfo) -> tuple[int | None, int]:
    most = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else None
    if most is not None:
        _check("sampling.max_new_tokens", most, Interval(1, info.max_model_len))
    least_bound = info.generation_defaults.max_new_tokens if most is None else most
    _check("sampling.min_new_tokens", sampling.min_new_tokens, Interval(0, least_bound))
    return most, sampling.min_new_tokens


def _logit_bias(sampling: pb.SamplingParams, info: ModelInfo) -> dict[int, float]:
    _check_count("sampling.logit_bias", len(sampling.logit_bias), "ids", most=MAX_LOGIT_BIASES)
    for token_id, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        _check(field, token_id, Interval(0, info.vocab_size - 1))
        _check(field, bias, BOUNDS["sampling.logit_bias"])
    return dict(sampling.logit_bias)


def _stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    _check_count("sampling.stop_strings", len(stop_strings), "strings", most=MAX_STOP_STRINGS)
    for index, stop in enumerate(stop_strings):
        _check_count(f"sampling.stop_strings[{index}]", len(stop), "characters", least=1, most=MAX_STOP_CHARS)
    return tuple(stop_strings)


def _trim(trim: pb.TrimOptions, info: ModelInfo) -> TrimRequest:
    if trim.mode not in TRIM_MODES:
        known = ", ".join(pb.TrimMode.Name(mode) for mode in TRIM_MODES)
        raise InvalidRequest("trim.mode", f"must be one of {known}, got {trim.mode}")
    if trim.policy and trim.policy not in info.policies:
        raise InvalidRequest("trim.policy", f"must be one of {', '.join(info.policies)}, got {trim.policy[:64]!r}")
    policy = info.policy_details[info.policies.index(trim.policy) if trim.policy else 0]
    if not policy.is_available:
        option = f"--{policy.knob.replace('_', '-')}"
        raise InvalidRequest("trim.policy", f"{policy.name!r} needs a server that was started with {option}")
    return TrimRequest(
        enabled=TRIM_MODES[trim.mode],
        policy=policy.name,
        k_ratio=_optional(trim, "k_ratio", "trim.", info.default_k_ratio),
        max_kept_fraction=_optional(trim, "max_kept_fraction", "trim.", None),
        merge_ratio=_optional(trim, "merge_ratio", "trim.", info.default_merge_ratio),
        return_selection=trim.return_selection,
        budget=_budget(trim.budget, policy),
        parameters=_parameters(trim.parameters, policy),
        look_again=_look_again(trim),
    )


def _budget(budget: pb.Budget, policy: PolicyInfo) -> Budget | None:
    path = "trim.budget."
    kind = budget.WhichOneof("kind")
    if kind is not None and kind not in policy.budgets:
        known = ", ".join(policy.budgets) or "none"
        raise InvalidRequest("trim.budget", f"must be one that policy {policy.name!r} takes ({known}), got {kind}")
    match kind:
        case "ratio":
            return FixedRatio(_number(budget, kind, path))
        case "count":
            return FixedCount(_number(budget, kind, path))
        case "top_p":
            return TopP(_number(budget, kind, path))
        case "knee":
            return Knee()
        case _:
            return None


def _look_again(trim: pb.TrimOptions) -> LookAgain | None:
    if not trim.HasField("look_again"):
        return None
    path = "trim.look_again."
    return LookAgain(_optional(trim.look_again, "side_ratio", path, LookAgain().side_ratio))


def _parameters(parameters: pb.PolicyParameters, policy: PolicyInfo) -> dict[str, float]:
    known = {parameter.name: parameter for parameter in policy.parameters}
    wanted: dict[str, float] = {}
    for field, value in parameters.ListFields():
        path = f"trim.parameters.{field.name}"
        if field.name not in known:
            names = ", ".join(known) or "none"
            raise InvalidRequest(path, f"must be a parameter of policy {policy.name!r} ({names})")
        bounds = known[field.name]
        _check(path, value, Interval(bounds.low, bounds.high, bounds.is_low_open))
        wanted[field.name] = value
    return wanted


def _constraint(request: pb.GenerateRequest) -> Constraint | None:
    match kind := request.WhichOneof("constraint"):
        case "json_schema":
            return JsonSchema(_sized(kind, request.json_schema, MAX_CONSTRAINT_BYTES))
        case "json_object":
            return JsonObject()
        case "regex":
            return Regex(_sized(kind, request.regex, MAX_EXPRESSION_BYTES))
        case "choice":
            options = tuple(request.choice.options)
            _check_count("choice.options", len(options), "options", least=1, most=MAX_CHOICES)
            for index, option in enumerate(options):
                _check_count(f"choice.options[{index}]", len(option), "characters", least=1, most=MAX_CONSTRAINT_BYTES)
            num_bytes = sum(len(option.encode()) for option in options)
            _check_count("choice.options", num_bytes, "bytes in all", most=MAX_CONSTRAINT_BYTES)
            return Choice(options)
        case "grammar":
            return LarkGrammar(_sized(kind, request.grammar, MAX_EXPRESSION_BYTES))
        case _:
            return None


def _sized(field: str, text: str, most: int) -> str:
    _check_count(field, len(text.encode()), "bytes", least=1, most=most)
    return text


def _check_token_ids(field: str, token_ids: Sequence[int], info: ModelInfo, *, may_be_image: bool = False) -> None:
    for index, token_id in enumerate(token_ids):
        if not (may_be_image and token_id == info.image_token_id):
            _check(f"{field}[{index}]", token_id, Interval(0, info.vocab_size - 1))
