from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]

class TrimMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRIM_MODE_UNSPECIFIED: _ClassVar[TrimMode]
    TRIM_MODE_OFF: _ClassVar[TrimMode]
    TRIM_MODE_ON: _ClassVar[TrimMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
TRIM_MODE_UNSPECIFIED: TrimMode
TRIM_MODE_OFF: TrimMode
TRIM_MODE_ON: TrimMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "chat", "raw_prompt", "prompt_token_ids", "images", "sampling", "trim", "priority", "adapter", "num_choices", "json_schema", "json_object", "regex", "choice", "grammar")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    RAW_PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TRIM_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    chat: Chat
    raw_prompt: str
    prompt_token_ids: TokenIds
    images: _containers.RepeatedCompositeFieldContainer[Image]
    sampling: SamplingParams
    trim: TrimOptions
    priority: int
    adapter: str
    num_choices: int
    json_schema: str
    json_object: JsonObject
    regex: str
    choice: ChoiceConstraint
    grammar: str
    def __init__(self, request_id: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., raw_prompt: _Optional[str] = ..., prompt_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., trim: _Optional[_Union[TrimOptions, _Mapping]] = ..., priority: _Optional[int] = ..., adapter: _Optional[str] = ..., num_choices: _Optional[int] = ..., json_schema: _Optional[str] = ..., json_object: _Optional[_Union[JsonObject, _Mapping]] = ..., regex: _Optional[str] = ..., choice: _Optional[_Union[ChoiceConstraint, _Mapping]] = ..., grammar: _Optional[str] = ...) -> None: ...

class JsonObject(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChoiceConstraint(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, options: _Optional[_Iterable[str]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "parts")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("text", "image")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: Image
    def __init__(self, text: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "mime_type")
    DATA_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    mime_type: str
    def __init__(self, data: _Optional[bytes] = ..., mime_type: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_new_tokens", "min_new_tokens", "ignore_eos", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop_strings", "stop_token_ids", "num_top_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_top_logprobs: int
    def __init__(self, max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., ignore_eos: bool = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_top_logprobs: _Optional[int] = ...) -> None: ...

class TrimOptions(_message.Message):
    __slots__ = ("mode", "policy", "k_ratio", "max_kept_fraction", "return_selection", "merge_ratio", "budget", "parameters", "look_again")
    MODE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    K_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_FRACTION_FIELD_NUMBER: _ClassVar[int]
    RETURN_SELECTION_FIELD_NUMBER: _ClassVar[int]
    MERGE_RATIO_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LOOK_AGAIN_FIELD_NUMBER: _ClassVar[int]
    mode: TrimMode
    policy: str
    k_ratio: float
    max_kept_fraction: float
    return_selection: bool
    merge_ratio: float
    budget: Budget
    parameters: PolicyParameters
    look_again: LookAgain
    def __init__(self, mode: _Optional[_Union[TrimMode, str]] = ..., policy: _Optional[str] = ..., k_ratio: _Optional[float] = ..., max_kept_fraction: _Optional[float] = ..., return_selection: bool = ..., merge_ratio: _Optional[float] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ..., parameters: _Optional[_Union[PolicyParameters, _Mapping]] = ..., look_again: _Optional[_Union[LookAgain, _Mapping]] = ...) -> None: ...

class LookAgain(_message.Message):
    __slots__ = ("side_ratio",)
    SIDE_RATIO_FIELD_NUMBER: _ClassVar[int]
    side_ratio: float
    def __init__(self, side_ratio: _Optional[float] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("ratio", "count", "top_p", "knee")
    RATIO_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    KNEE_FIELD_NUMBER: _ClassVar[int]
    ratio: float
    count: int
    top_p: float
    knee: Knee
    def __init__(self, ratio: _Optional[float] = ..., count: _Optional[int] = ..., top_p: _Optional[float] = ..., knee: _Optional[_Union[Knee, _Mapping]] = ...) -> None: ...

class Knee(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PolicyParameters(_message.Message):
    __slots__ = ("relevance_weight", "relevance_power", "layer", "num_layers", "important_ratio", "contextual_ratio", "threshold", "temperature", "hops", "global_threshold", "entropy_weight", "spatial_weight", "central_weight", "recovered_ratio", "rounds", "transport_temperature", "cascade_ratio", "late_exit_threshold", "recycle_ratio", "certainty")
    RELEVANCE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_POWER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    IMPORTANT_RATIO_FIELD_NUMBER: _ClassVar[int]
    CONTEXTUAL_RATIO_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SPATIAL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CENTRAL_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_RATIO_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    CASCADE_RATIO_FIELD_NUMBER: _ClassVar[int]
    LATE_EXIT_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    RECYCLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    CERTAINTY_FIELD_NUMBER: _ClassVar[int]
    relevance_weight: float
    relevance_power: float
    layer: int
    num_layers: int
    important_ratio: float
    contextual_ratio: float
    threshold: float
    temperature: float
    hops: int
    global_threshold: float
    entropy_weight: float
    spatial_weight: float
    central_weight: float
    recovered_ratio: float
    rounds: int
    transport_temperature: float
    cascade_ratio: float
    late_exit_threshold: float
    recycle_ratio: float
    certainty: float
    def __init__(self, relevance_weight: _Optional[float] = ..., relevance_power: _Optional[float] = ..., layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., important_ratio: _Optional[float] = ..., contextual_ratio: _Optional[float] = ..., threshold: _Optional[float] = ..., temperature: _Optional[float] = ..., hops: _Optional[int] = ..., global_threshold: _Optional[float] = ..., entropy_weight: _Optional[float] = ..., spatial_weight: _Optional[float] = ..., central_weight: _Optional[float] = ..., recovered_ratio: _Optional[float] = ..., rounds: _Optional[int] = ..., transport_temperature: _Optional[float] = ..., cascade_ratio: _Optional[float] = ..., late_exit_threshold: _Optional[float] = ..., recycle_ratio: _Optional[float] = ..., certainty: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "model_id", "model_revision", "text", "token_ids", "logprobs", "finish_reason", "matched_stop_string", "matched_stop_token_id", "usage", "cross_kv_bytes", "timings", "seed", "selections", "choices", "looked_at")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    LOOKED_AT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    model_revision: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: FinishReason
    matched_stop_string: str
    matched_stop_token_id: int
    usage: Usage
    cross_kv_bytes: CrossKvBytes
    timings: Timings
    seed: int
    selections: _containers.RepeatedCompositeFieldContainer[ImageSelection]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    looked_at: Region
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop_string: _Optional[str] = ..., matched_stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cross_kv_bytes: _Optional[_Union[CrossKvBytes, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., seed: _Optional[int] = ..., selections: _Optional[_Iterable[_Union[ImageSelection, _Mapping]]] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., looked_at: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "finish_reason", "matched_stop_string", "matched_stop_token_id", "usage", "cross_kv_bytes", "timings")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    finish_reason: FinishReason
    matched_stop_string: str
    matched_stop_token_id: int
    usage: Usage
    cross_kv_bytes: CrossKvBytes
    timings: Timings
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop_string: _Optional[str] = ..., matched_stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cross_kv_bytes: _Optional[_Union[CrossKvBytes, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: TokenDelta
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[TokenDelta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "model_id", "model_revision", "num_prompt_tokens", "images", "seed", "selections", "looked_at")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    LOOKED_AT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    model_revision: str
    num_prompt_tokens: int
    images: _containers.RepeatedCompositeFieldContainer[ImageUsage]
    seed: int
    selections: _containers.RepeatedCompositeFieldContainer[ImageSelection]
    looked_at: Region
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., images: _Optional[_Iterable[_Union[ImageUsage, _Mapping]]] = ..., seed: _Optional[int] = ..., selections: _Optional[_Iterable[_Union[ImageSelection, _Mapping]]] = ..., looked_at: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("top", "left", "height", "width")
    TOP_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    top: float
    left: float
    height: float
    width: float
    def __init__(self, top: _Optional[float] = ..., left: _Optional[float] = ..., height: _Optional[float] = ..., width: _Optional[float] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "choice")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    choice: int
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., choice: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("finish_reason", "matched_stop_string", "matched_stop_token_id", "usage", "cross_kv_bytes", "timings", "choice")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    matched_stop_string: str
    matched_stop_token_id: int
    usage: Usage
    cross_kv_bytes: CrossKvBytes
    timings: Timings
    choice: int
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop_string: _Optional[str] = ..., matched_stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cross_kv_bytes: _Optional[_Union[CrossKvBytes, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., choice: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_generated_tokens", "images")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_generated_tokens: int
    images: _containers.RepeatedCompositeFieldContainer[ImageUsage]
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., images: _Optional[_Iterable[_Union[ImageUsage, _Mapping]]] = ...) -> None: ...

class ImageUsage(_message.Message):
    __slots__ = ("padding_features", "valid_features", "kept_features", "merged_features", "layer_rows")
    PADDING_FEATURES_FIELD_NUMBER: _ClassVar[int]
    VALID_FEATURES_FIELD_NUMBER: _ClassVar[int]
    KEPT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    MERGED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    LAYER_ROWS_FIELD_NUMBER: _ClassVar[int]
    padding_features: int
    valid_features: int
    kept_features: int
    merged_features: int
    layer_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, padding_features: _Optional[int] = ..., valid_features: _Optional[int] = ..., kept_features: _Optional[int] = ..., merged_features: _Optional[int] = ..., layer_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class CrossKvBytes(_message.Message):
    __slots__ = ("untrimmed", "held", "saved_by_padding", "saved_by_trimming", "saved_by_visibility")
    UNTRIMMED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SAVED_BY_PADDING_FIELD_NUMBER: _ClassVar[int]
    SAVED_BY_TRIMMING_FIELD_NUMBER: _ClassVar[int]
    SAVED_BY_VISIBILITY_FIELD_NUMBER: _ClassVar[int]
    untrimmed: int
    held: int
    saved_by_padding: int
    saved_by_trimming: int
    saved_by_visibility: int
    def __init__(self, untrimmed: _Optional[int] = ..., held: _Optional[int] = ..., saved_by_padding: _Optional[int] = ..., saved_by_trimming: _Optional[int] = ..., saved_by_visibility: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_seconds", "preprocess_seconds", "vision_seconds", "prefill_seconds", "decode_seconds", "time_to_first_token_seconds", "total_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VISION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., preprocess_seconds: _Optional[float] = ..., vision_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., time_to_first_token_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ...) -> None: ...

class ImageSelection(_message.Message):
    __slots__ = ("tiles_high", "tiles_wide", "features_per_tile", "content_height", "content_width", "kept", "picks_by_head")
    TILES_HIGH_FIELD_NUMBER: _ClassVar[int]
    TILES_WIDE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    PICKS_BY_HEAD_FIELD_NUMBER: _ClassVar[int]
    tiles_high: int
    tiles_wide: int
    features_per_tile: int
    content_height: int
    content_width: int
    kept: bytes
    picks_by_head: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tiles_high: _Optional[int] = ..., tiles_wide: _Optional[int] = ..., features_per_tile: _Optional[int] = ..., content_height: _Optional[int] = ..., content_width: _Optional[int] = ..., kept: _Optional[bytes] = ..., picks_by_head: _Optional[_Iterable[bytes]] = ...) -> None: ...
