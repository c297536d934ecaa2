from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_STAGE_UNSPECIFIED: _ClassVar[PolicyStage]
    POLICY_STAGE_BEFORE_DECODER: _ClassVar[PolicyStage]
    POLICY_STAGE_AFTER_FIRST_LAYER: _ClassVar[PolicyStage]
POLICY_STAGE_UNSPECIFIED: PolicyStage
POLICY_STAGE_BEFORE_DECODER: PolicyStage
POLICY_STAGE_AFTER_FIRST_LAYER: PolicyStage

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model_id", "model_revision", "dtype", "device", "num_parameters", "vocab_size", "image_token_id", "max_model_len", "max_images", "max_image_bytes", "max_image_pixels", "num_self_attention_layers", "num_cross_attention_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "tile_size", "patch_size", "max_tiles", "features_per_tile", "cross_kv_bytes_per_feature", "self_kv_bytes_per_token", "policies", "default_k_ratio", "generation_defaults", "default_merge_ratio", "policy_details", "quantization", "weight_bytes", "kv_dtype", "tensor_parallel")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    NUM_SELF_ATTENTION_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_CROSS_ATTENTION_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TILE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TILES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_BYTES_PER_FEATURE_FIELD_NUMBER: _ClassVar[int]
    SELF_KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_K_RATIO_FIELD_NUMBER: _ClassVar[int]
    GENERATION_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MERGE_RATIO_FIELD_NUMBER: _ClassVar[int]
    POLICY_DETAILS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_revision: str
    dtype: str
    device: str
    num_parameters: int
    vocab_size: int
    image_token_id: int
    max_model_len: int
    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    num_self_attention_layers: int
    num_cross_attention_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    tile_size: int
    patch_size: int
    max_tiles: int
    features_per_tile: int
    cross_kv_bytes_per_feature: int
    self_kv_bytes_per_token: int
    policies: _containers.RepeatedScalarFieldContainer[str]
    default_k_ratio: float
    generation_defaults: GenerationDefaults
    default_merge_ratio: float
    policy_details: _containers.RepeatedCompositeFieldContainer[Policy]
    quantization: str
    weight_bytes: int
    kv_dtype: str
    tensor_parallel: int
    def __init__(self, model_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., num_parameters: _Optional[int] = ..., vocab_size: _Optional[int] = ..., image_token_id: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_images: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., num_self_attention_layers: _Optional[int] = ..., num_cross_attention_layers: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden_size: _Optional[int] = ..., tile_size: _Optional[int] = ..., patch_size: _Optional[int] = ..., max_tiles: _Optional[int] = ..., features_per_tile: _Optional[int] = ..., cross_kv_bytes_per_feature: _Optional[int] = ..., self_kv_bytes_per_token: _Optional[int] = ..., policies: _Optional[_Iterable[str]] = ..., default_k_ratio: _Optional[float] = ..., generation_defaults: _Optional[_Union[GenerationDefaults, _Mapping]] = ..., default_merge_ratio: _Optional[float] = ..., policy_details: _Optional[_Iterable[_Union[Policy, _Mapping]]] = ..., quantization: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kv_dtype: _Optional[str] = ..., tensor_parallel: _Optional[int] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("name", "summary", "stage", "needs", "budgets", "parameters", "knob", "is_available")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KNOB_FIELD_NUMBER: _ClassVar[int]
    IS_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    summary: str
    stage: PolicyStage
    needs: _containers.RepeatedScalarFieldContainer[str]
    budgets: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedCompositeFieldContainer[PolicyParameter]
    knob: str
    is_available: bool
    def __init__(self, name: _Optional[str] = ..., summary: _Optional[str] = ..., stage: _Optional[_Union[PolicyStage, str]] = ..., needs: _Optional[_Iterable[str]] = ..., budgets: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[_Union[PolicyParameter, _Mapping]]] = ..., knob: _Optional[str] = ..., is_available: bool = ...) -> None: ...

class PolicyParameter(_message.Message):
    __slots__ = ("name", "description", "default_value", "low", "high", "is_low_open")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    IS_LOW_OPEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    default_value: float
    low: float
    high: float
    is_low_open: bool
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., default_value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., is_low_open: bool = ...) -> None: ...

class GenerationDefaults(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "eos_token_ids")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., max_new_tokens: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GetServerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerStatusResponse(_message.Message):
    __slots__ = ("version", "is_ready", "num_running", "num_waiting", "max_batch", "max_queue", "self_kv_bytes", "cross_kv_bytes", "cross_kv_untrimmed_bytes", "uptime_seconds", "kv_capacity_bytes", "image_cache_capacity_bytes", "image_cache_bytes", "image_cache_hits", "image_cache_misses", "adapter_bytes", "num_preemptions", "num_recomputed_tokens", "pixel_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    SELF_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CROSS_KV_UNTRIMMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CACHE_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CACHE_MISSES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PIXEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    is_ready: bool
    num_running: int
    num_waiting: int
    max_batch: int
    max_queue: int
    self_kv_bytes: int
    cross_kv_bytes: int
    cross_kv_untrimmed_bytes: int
    uptime_seconds: float
    kv_capacity_bytes: int
    image_cache_capacity_bytes: int
    image_cache_bytes: int
    image_cache_hits: int
    image_cache_misses: int
    adapter_bytes: int
    num_preemptions: int
    num_recomputed_tokens: int
    pixel_bytes: int
    def __init__(self, version: _Optional[str] = ..., is_ready: bool = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_queue: _Optional[int] = ..., self_kv_bytes: _Optional[int] = ..., cross_kv_bytes: _Optional[int] = ..., cross_kv_untrimmed_bytes: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., kv_capacity_bytes: _Optional[int] = ..., image_cache_capacity_bytes: _Optional[int] = ..., image_cache_bytes: _Optional[int] = ..., image_cache_hits: _Optional[int] = ..., image_cache_misses: _Optional[int] = ..., adapter_bytes: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_recomputed_tokens: _Optional[int] = ..., pixel_bytes: _Optional[int] = ...) -> None: ...
