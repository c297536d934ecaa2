"""From a checkpoint to a model that is ready to serve, or only to a description of it."""

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import torch

from trimserve import ops
from trimserve.api.info import GenerationDefaults, ModelInfo, PolicyInfo
from trimserve.config import Device, EngineConfig, ModelConfig, Quantize
from trimserve.errors import CheckpointError
from trimserve.imaging.decode import Decode
from trimserve.model.adapter_files import read_adapter
from trimserve.model.checkpoint import (
    EMBEDDED_MODEL,
    Checkpoint,
    embedded_model_folder,
    open_checkpoint,
    text_config,
    vision_config,
)
from trimserve.model.codebook import load_codebook
from trimserve.model.kv_format import row_bytes
from trimserve.model.mllama import Mllama
from trimserve.model.processor import Processor
from trimserve.model.quantization import WeightFormat
from trimserve.model.ranks import ALONE, Ranks, Shard
from trimserve.model.rotary import check_rotary
from trimserve.model.sharding import check_shares
from trimserve.model.trained_file import load_trained_files, methods_of
from trimserve.model.transformers_mllama import decoder_linears, step_modules
from trimserve.model.vision import vision_scratch_bytes
from trimserve.model.weights import empty_model, load_weights, num_parameters, stored_formats, weight_bytes
from trimserve.trimming.policies.policy import Policy
from trimserve.trimming.policies.table import POLICIES

__all__ = [
    "EMBEDDED_MODEL",
    "describe_checkpoint",
    "describe_model",
    "embedded_model_folder",
    "load_model",
    "load_processor",
]

log = logging.getLogger(__name__)

_MAX_NEW_TOKENS: Final = 256
"""Of an answer, when neither the request nor the checkpoint says."""

_ON_GPU: Final[tuple[Quantize, ...]] = ("none", "int8")


def describe_model(config: ModelConfig, limits: EngineConfig, device: str | None = None) -> ModelInfo:
    """Describe a checkpoint, and its guide, from their small files; weights are not read, but adapters are checked.

    Args:
        config: which one, and how it would be read.
        limits: bounds of a request's images and tokens.
        device: `cpu` or `cuda:0`, which need not be there; None is what `config.device` says.
    Raises:
        CheckpointError: not found, not an Mllama, something that cannot be honoured, such as a device that is not
            there, or a codebook, a compressor, a guide or an adapter that does not fit.
    """
    checkpoint = open_checkpoint(config.model, config.revision, with_weights=False)
    info = describe_checkpoint(checkpoint, config, limits, device)
    if config.codebook is not None:
        load_codebook(config.codebook, info, config.intermediate_features)
    load_trained_files(config.compressor, info, config.intermediate_features)
    if config.adapter:
        model = empty_model(checkpoint.config, checkpoint.dtype(config.dtype))
        for folder in config.adapters.values():
            read_adapter(folder, model, checkpoint.dtype(config.dtype))
    return info


def load_model(config: ModelConfig, limits: EngineConfig, decode: Decode | None = None, ranks: Ranks = ALONE) -> Mllama:
    """Load a checkpoint, with its guide, its codebook and its compressors.

    Args:
        config: which one, and how.
        limits: bounds of a request's images and tokens.
        decode: decodes image files, see `Processor`.
        ranks: `limits.tensor_parallel` of them, of which this process loads its part.
    Returns:
        The model on its device.
    Raises:
        CheckpointError: as `describe_model`, or weights that are missing, broken or not in safetensors.
    """
    checkpoint = open_checkpoint(config.model, config.revision, with_weights=True)
    info = _of_rank(describe_checkpoint(checkpoint, config, limits), ranks)
    processor = _processor(checkpoint, info, limits, decode)
    if ranks.shard.rank == 0:
        _warn_of_what_has_no_effect(checkpoint)
    prototypes = guide = None
    if config.codebook is not None:
        prototypes = load_codebook(config.codebook, info, config.intermediate_features)
    trained = load_trained_files(config.compressor, info, config.intermediate_features)
    if config.guide_model is not None:
        guide = load_model(_guide_config(config), limits, ranks=ranks)
    if guide is not None and guide.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise CheckpointError(f"guide_model {guide.info.model_id}: has other tokens than {info.model_id}")
    dtype, device = checkpoint.dtype(config.dtype), torch.device(info.device)
    torch.set_float32_matmul_precision("highest")  # float32 means float32, whatever was set or is in the environment
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # in convolutions too
    model = load_weights(checkpoint.folder, checkpoint.config, dtype, device, config.quantize, ranks.shard)
    return Mllama(model, processor, info, config.intermediate_features, prototypes, trained, guide, ranks)


def load_processor(config: ModelConfig, limits: EngineConfig) -> Processor:
    """Load what prepares prompts and images, without weights, for a process that does not compute.

    Args:
        config: which checkpoint, and how it would be read.
        limits: bounds of a request's images and tokens.
    Raises:
        CheckpointError: see `describe_model`.
    """
    checkpoint = open_checkpoint(config.model, config.revision, with_weights=False)
    return _processor(checkpoint, describe_checkpoint(checkpoint, config, limits), limits)


def _processor(
    checkpoint: Checkpoint, info: ModelInfo, limits: EngineConfig, decode: Decode | None = None
) -> Processor:
    return Processor.from_pretrained(
        checkpoint.folder,
        info,
        max_image_pixels=limits.max_image_pixels,
        decode=decode,
    )


def _of_rank(info: ModelInfo, ranks: Ranks) -> ModelInfo:
    """With the device of this rank."""
    assert info.tensor_parallel == ranks.shard.size
    return replace(info, device=f"cuda:{ranks.shard.rank}") if info.device.startswith("cuda") else info


def _guide_config(config: ModelConfig) -> ModelConfig:
    others = {"revision": None, "codebook": None, "guide_model": None, "max_model_len": None}
    return config.model_copy(update={"model": config.guide_model, **others, "adapter": (), "compressor": ()})


def _describe_guide(config: ModelConfig, limits: EngineConfig, info: ModelInfo) -> ModelInfo:
    guide = describe_model(_guide_config(config), limits, info.device)
    if _grid(guide) != _grid(info):
        raise CheckpointError(
            f"guide_model: must have the patch grid of the model: {guide.model_id} has {_grid(guide)}, "
            f"{info.model_id} has {_grid(info)}"
        )
    if (guide.vocab_size, guide.image_token_id) != (info.vocab_size, info.image_token_id):
        raise CheckpointError(
            f"guide_model: must have the tokens of the model: {guide.model_id} has {guide.vocab_size} and the image "
            f"token {guide.image_token_id}, {info.model_id} has {info.vocab_size} and {info.image_token_id}"
        )
    return guide


def _grid(info: ModelInfo) -> str:
    return f"up to {info.max_tiles} tiles of {info.tile_size} pixels, patches of {info.patch_size}"


def describe_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, limits: EngineConfig, device: str | None = None
) -> ModelInfo:
    """The same of a checkpoint whose small files were read.

    Args:
        checkpoint: which one; its folder is not looked at.
        config: how it would be read.
        limits: as in `describe_model`.
        device: as in `describe_model`.
    Raises:
        CheckpointError: something that cannot be honoured.
    """
    text, vision = text_config(checkpoint.config), vision_config(checkpoint.config)
    check_rotary(checkpoint.folder / "config.json", checkpoint.config)
    dtype = checkpoint.dtype(config.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    kv_dtype = dtype_name if config.kv_dtype == "auto" else config.kv_dtype
    device = _device(config.device, limits.tensor_parallel) if device is None else device
    _check_stored(config, device)
    stored = stored_formats(checkpoint.config, checkpoint.tensors) if device == "cpu" else {}
    own_format = next((each.name for each in stored.values()), "none")
    sizes = _sizes(checkpoint, config, stored, limits.tensor_parallel)
    num_cross = len(text.cross_attention_layers or [])
    head_dim = text.hidden_size // text.num_attention_heads
    assert isinstance(vision.image_size, int)
    assert isinstance(vision.patch_size, int)
    features_per_tile = (vision.image_size // vision.patch_size) ** 2 + 1
    info = ModelInfo(
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        dtype=dtype_name,
        kv_dtype=kv_dtype,
        quantization=own_format if config.quantize == "none" else config.quantize,
        device=device,
        num_parameters=sizes.num_parameters,
        weight_bytes=sizes.weight_bytes,
        linear_bytes=sizes.linear_bytes,
        step_weight_bytes=sizes.step_weight_bytes,
        tensor_parallel=limits.tensor_parallel,
        vocab_size=text.vocab_size,
        image_token_id=checkpoint.config.image_token_index,
        max_model_len=_max_model_len(text.max_position_embeddings, config.max_model_len),
        max_images=limits.max_images,
        num_self_attention_layers=text.num_hidden_layers - num_cross,
        num_cross_attention_layers=num_cross,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        max_tiles=vision.max_num_tiles,
        features_per_tile=features_per_tile,
        kv_bytes_per_position=2 * text.num_key_value_heads * row_bytes(kv_dtype, head_dim),
        vision_scratch_bytes=vision_scratch_bytes(vision, features_per_tile, dtype),
        default_k_ratio=config.k_ratio or checkpoint.trimserve.k_ratio,
        default_merge_ratio=checkpoint.trimserve.merge_ratio if config.merge_ratio is None else config.merge_ratio,
        policy_details=_policy_details(config),
        generation_defaults=_generation_defaults(checkpoint),
    )
    check_shares(config, info)
    return info if config.guide_model is None else replace(info, guide=_describe_guide(config, limits, info))


class _Sizes(NamedTuple):
    """See `ModelInfo`."""

    num_parameters: int
    weight_bytes: int
    linear_bytes: int
    step_weight_bytes: int


def _sizes(checkpoint: Checkpoint, config: ModelConfig, stored: Mapping[str, WeightFormat], num_ranks: int) -> _Sizes:
    """Of a model without weights; bytes are those of a rank, times the ranks."""
    make = partial(empty_model, checkpoint.config, checkpoint.dtype(config.dtype), config.quantize, stored)
    whole = make()
    of_rank = whole if num_ranks == 1 else make(Shard(0, num_ranks))
    modules = (of_rank.modules(), decoder_linears(of_rank), step_modules(of_rank))
    return _Sizes(num_parameters(whole), *(num_ranks * weight_bytes(each) for each in modules))


def _policy_details(config: ModelConfig) -> tuple[PolicyInfo, ...]:
    """Every policy, and whether the config has what it needs."""
    learned = methods_of(config.compressor)

    def is_available(name: str, policy: type[Policy]) -> bool:
        if policy.trained:
            return name in learned
        return not policy.knob or getattr(config, policy.knob) is not None

    return tuple(policy.describe(is_available=is_available(name, policy)) for name, policy in POLICIES.items())


def _check_stored(config: ModelConfig, device: str) -> None:
    """Only a CPU takes every way to store weights, keys and values."""
    if device != "cpu" and config.quantize not in _ON_GPU:
        raise CheckpointError(f"quantize {config.quantize} is for the CPU; take {' or '.join(_ON_GPU)}, or device cpu")
    if device != "cpu" and config.kv_dtype != "auto":
        raise CheckpointError(f"kv_dtype {config.kv_dtype} is for the CPU; take auto, or device cpu")


def _device(wanted: Device, num_ranks: int) -> str:
    """As in `ModelInfo.device`; there are as many."""
    why_not = None
    if not torch.cuda.is_available():
        why_not = "torch sees no GPU"
    elif not ops.has_cuda_ops():
        why_not = "the ops are built without CUDA (TRIMSERVE_CUDA)"
    if wanted == "cpu" or (wanted == "auto" and why_not is not None):
        return "cpu"
    if why_not is not None:
        raise CheckpointError(f"device cuda: {why_not}")
    if 1 < num_ranks > torch.cuda.device_count():
        raise CheckpointError(f"tensor_parallel must be at most {torch.cuda.device_count()}, the GPUs, got {num_ranks}")
    return "cuda:0"


def _max_model_len(limit: int, wanted: int | None) -> int:
    if wanted is not None and wanted > limit:
        raise CheckpointError(f"max_model_len must be at most {limit}, the checkpoint's own, got {wanted}")
    return wanted or limit


def _generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    generation = checkpoint.generation
    return GenerationDefaults(
        temperature=generation.temperature if generation.do_sample else 0.0,
        top_p=generation.top_p if generation.do_sample else 1.0,
        top_k=generation.top_k if generation.do_sample else 0,
        min_p=generation.min_p if generation.do_sample else 0.0,
        repetition_penalty=generation.repetition_penalty,
        max_new_tokens=generation.max_new_tokens or _MAX_NEW_TOKENS,
        eos_token_ids=_eos_token_ids(checkpoint),
    )


def _warn_of_what_has_no_effect(checkpoint: Checkpoint) -> None:
    file = checkpoint.generation_file
    for name, value in checkpoint.generation.without_effect.items():
        said = reprlib.repr(value)
        log.warning("%s: %s has no effect here, got %s", file, name, said, extra={"field": name, "value": said})


def _eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end an answer. An id past the vocabulary ends none; -1 would mean the vocabulary's last token."""
    name, eos = f"{checkpoint.generation_file.name}: eos_token_id", checkpoint.generation.eos_token_id
    if eos is None:  # not said at all, or by a config.json beside a generation_config.json
        name, eos = "config.json: text_config.eos_token_id", text_config(checkpoint.config).eos_token_id
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(0 <= id_ < 2**32 for id_ in ids):
        raise CheckpointError(f"{checkpoint.folder}/{name} must be in [0, 2^32), got {eos}")
    return ids
