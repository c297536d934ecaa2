"""From a folder or a hub id to a model that is ready to serve; refuses by name what cannot be honoured.

Only safetensors are read and no code of a checkpoint is run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig, MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

import trimserve
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.models.info import GenerationDefaults, ModelInfo
from trimserve.models.mllama import Mllama
from trimserve.models.processor import Processor
from trimserve.models.trimming import POLICIES
from trimserve.models.weights import load_weights, text_config, vision_config

__all__ = ["EMBEDDED_MODEL", "embedded_model_folder", "load_model"]

EMBEDDED_MODEL = "trimserve-tiny"
"""Name of the model that the package ships; what `--model` means when it is not given."""

T = TypeVar("T")

_DEFAULT_K_RATIO = 0.2
_HASHED_BYTES = 1 << 20


def embedded_model_folder() -> Path:
    """Where the embedded model lies."""
    return Path(trimserve.__file__).parent / "assets" / EMBEDDED_MODEL


def load_model(config: ModelConfig, limits: EngineConfig) -> Mllama:
    """Load a checkpoint.

    Args:
        config: which one, and how.
        limits: bounds of a request's images and tokens.
    Returns:
        The model on its device.
    Raises:
        CheckpointError: not found, not an Mllama, not in safetensors, or with a quantization or adapter.
    """
    model_id = config.model or EMBEDDED_MODEL
    folder, revision = _locate(model_id, config.revision)
    model_config = _read_config(folder)
    dtype = _dtype(config.dtype, model_config)
    device = torch.device("cpu")
    generation = _generation_defaults(folder, text_config(model_config), limits.default_max_new_tokens)
    trimserve_json = _read_json(folder / "trimserve.json")
    text, vision = text_config(model_config), vision_config(model_config)
    tile_size, patch_size = _square(vision.image_size), _square(vision.patch_size)
    max_model_len = text.max_position_embeddings
    if config.max_model_len is not None:
        if config.max_model_len > max_model_len:
            raise CheckpointError(f"max_model_len must be at most {max_model_len}, got {config.max_model_len}")
        max_model_len = config.max_model_len
    model = load_weights(folder, model_config, dtype, device)
    head_dim = text.hidden_size // text.num_attention_heads
    num_cross = len(text.cross_attention_layers or [])
    info = ModelInfo(
        model_id=model_id,
        revision=revision,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=text.vocab_size,
        image_token_id=model_config.image_token_index,
        max_model_len=max_model_len,
        max_images=limits.max_images,
        num_self_attention_layers=text.num_hidden_layers - num_cross,
        num_cross_attention_layers=num_cross,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=text.hidden_size,
        tile_size=tile_size,
        patch_size=patch_size,
        max_tiles=vision.max_num_tiles,
        features_per_tile=(tile_size // patch_size) ** 2 + 1,
        kv_bytes_per_position=2 * text.num_key_value_heads * head_dim * dtype.itemsize,
        default_k_ratio=config.k_ratio or trimserve_json.get("k_ratio", _DEFAULT_K_RATIO),
        policies=POLICIES,
        generation_defaults=generation,
    )
    processor = Processor.from_pretrained(
        folder, info, template_date=config.template_date, max_image_pixels=limits.max_image_pixels
    )
    return Mllama(model, processor, info, config.intermediate_features)


def _locate(model: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a checkpoint and its revision."""
    folder = embedded_model_folder() if model == EMBEDDED_MODEL else Path(model)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision}: {folder} is a folder; only hub models have revisions")
        return folder, _content_hash(folder)
    try:
        snapshot = snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{model}: neither a folder nor a hub model that can be had: {error}") from error
    return Path(snapshot), Path(snapshot).name


def _content_hash(folder: Path) -> str:
    """Tells two folders apart: names, sizes, and both ends of each file."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_HASHED_BYTES))
            stream.seek(max(0, size - _HASHED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, got {type(content).__name__}")
    return content


def _read_config(folder: Path) -> MllamaConfig:
    raw = _read_json(folder / "config.json")
    if not raw:
        raise CheckpointError(f"{folder}: no config.json")
    if raw.get("model_type") != "mllama":
        raise CheckpointError(f"{folder}: model_type must be mllama, got {raw.get('model_type')}")
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{folder}: quantization_config with quant_method {method} is not supported")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: adapter_config.json: adapters are not supported; merge it into the weights")
    try:
        config = MllamaConfig.from_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    vision = vision_config(config)
    expected = [list(ratio) for ratio in get_all_supported_aspect_ratios(vision.max_num_tiles)]
    if vision.supported_aspect_ratios != expected:
        raise CheckpointError(
            f"{folder}/config.json: supported_aspect_ratios must be those of the image processor for "
            f"{vision.max_num_tiles} tiles, {expected}, got {vision.supported_aspect_ratios}"
        )
    return config


def _square(side: int | list[int] | tuple[int, int]) -> int:
    if not isinstance(side, int):
        raise CheckpointError(f"image_size and patch_size must be the side of a square, got {side}")
    return side


def _dtype(name: str, config: MllamaConfig) -> torch.dtype:
    chosen = (config.dtype or torch.float32) if name == "auto" else name
    dtype = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return dtype


def _generation_defaults(folder: Path, config: MllamaTextConfig, max_new_tokens: int) -> GenerationDefaults:
    has_file = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(folder) if has_file else GenerationConfig()
    eos = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    samples = bool(generation.do_sample)
    return GenerationDefaults(
        temperature=_or(generation.temperature, 1.0) if samples else 0.0,
        top_p=_or(generation.top_p, 1.0) if samples else 1.0,
        top_k=_or(generation.top_k, 0) if samples else 0,
        min_p=_or(generation.min_p, 0.0) if samples else 0.0,
        repetition_penalty=_or(generation.repetition_penalty, 1.0),
        max_new_tokens=_or(generation.max_new_tokens, max_new_tokens),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
