"""Reads LoRA adapters as PEFT saves them, and refuses what would not be computed exactly as PEFT does.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named after the modules of
transformers' model, today's or those before 4.52. Every tensor must belong to a layer of the model and have its shape;
every setting must be one that is honoured here, or that does not matter once training is over.
"""

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimserve.errors import AdapterError, CheckpointError
from trimserve.model.adapters import Adapter, Change
from trimserve.model.json_object import read_json
from trimserve.model.stored_tensors import current_name
from trimserve.model.transformers_mllama import (
    MllamaForConditionalGeneration,
    decoder_parts,
    feature_kv_module_names,
    vision_module_names,
)
from trimserve.validation import complaint

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "read_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

Number = TypeVar("Number", int, float)

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
    "weight": "weight",
    "bias": "bias",
}
"""How the tensors of a layer end, and what they are; the first ending that fits counts."""

_DTYPES = {"F64", "F32", "F16", "BF16"}

_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "lora_dropout", "ensure_weight_tying"),
    *("fan_in_fan_out", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings that do not matter here: they name things, or were for training. (Linear layers ignore `fan_in_fan_out`.)"""

_CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin training that change the base model's weights, which a saved adapter does not have."""


class _Config(BaseModel, extra="allow", allow_inf_nan=False):
    """What is honoured of `adapter_config.json`; what is not here must have no effect, or no value."""

    peft_type: str
    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str = []
    exclude_modules: list[str] | str = []
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] = []
    init_lora_weights: bool | str = True

    def rank(self, module: str) -> int:
        """Of a module, by its name in the file."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def must_target(self, module: str) -> bool:
        """Whether a module is certain to have a LoRA; what patterns and exceptions choose is left to the file."""
        if isinstance(self.target_modules, str) or self.exclude_modules or self.layers_to_transform is not None:
            return False
        return _is_named(module, self.target_modules) and not _is_named(module, self.modules_to_save)


@dataclass(slots=True)
class _Layer:
    """A layer that the file changes."""

    spelled: str
    """Its name in the file."""
    name: str
    """Its name in the model."""
    module: nn.Linear | nn.Embedding
    tensors: dict[str, str] = field(default_factory=dict)
    """Names of its tensors by what they are, see `_PARTS`."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """What its tensors must be."""
        if isinstance(self.module, nn.Embedding):
            tokens, width = self.module.num_embeddings, self.module.embedding_dim
            return {"down": (rank, tokens), "up": (width, rank), "weight": (tokens, width)}
        columns, outputs = self.module.in_features, self.module.out_features
        shapes = {"down": (rank, columns), "up": (outputs, rank), "up_bias": (outputs,), "weight": (outputs, columns)}
        return shapes if self.module.bias is None else {**shapes, "bias": (outputs,)}


def read_adapter(folder: Path, model: MllamaForConditionalGeneration, dtype: torch.dtype) -> Adapter:
    """Read an adapter onto the model's device.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model; on the meta device the adapter is checked, and has no values.
        dtype: of the result; the file may hold another.
    Raises:
        AdapterError: a file is missing or broken, asks for what cannot be honoured, or does not fit the model. It names
            the file, the tensor or setting, and the reason.
    """
    config = _read_config(folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise AdapterError(f"{file}: there is no such file; only adapters in safetensors are read")
    try:
        with safe_open(file, framework="pt") as tensors:
            layers = _layers(file, tensors, model, config)
            changes: dict[nn.Module, Change] = {
                layer.module: _change(file, tensors, layer, config, dtype) for layer in layers
            }
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a complete safetensors file: {error}") from error
    vision = vision_module_names()
    changes_images = any(layer.name.startswith(vision) for layer in layers)
    changes_kv = any(layer.name.endswith(feature_kv_module_names()) for layer in layers)
    return Adapter(
        changes=changes,
        modules=tuple(sorted({re.sub(r"\.\d+\.", ".*.", layer.name) for layer in layers})),
        rank=max((config.rank(layer.spelled) for layer in layers if "down" in layer.tensors), default=0),
        image_key=uuid.uuid4().bytes if changes_images else b"",
        kv_key=uuid.uuid4().bytes if changes_kv else b"",
    )


def _read_config(file: Path) -> _Config:
    if not file.is_file():
        raise AdapterError(f"{file}: there is no such file")
    try:
        content = {name: value for name, value in read_json(file).items() if value is not None}
        config = _Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{file}: {setting}: {complaint(first)}") from error
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if config.peft_type != "LORA":
        raise AdapterError(f"{file}: peft_type must be LORA, got {config.peft_type}")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{file}: {pattern!r} is not a regular expression: {error}") from error
    for name, value in (config.model_extra or {}).items():
        if value and name not in _WITHOUT_EFFECT:
            raise AdapterError(f"{file}: {name} is not supported, got {value!r}")
    begin = config.init_lora_weights
    if isinstance(begin, str) and begin.lower().startswith(_CHANGES_THE_BASE):
        raise AdapterError(
            f"{file}: init_lora_weights {begin} changes the base model, which is shared here; "
            "save the adapter with path_initial_model_for_weight_conversion"
        )
    return config


def _layers(file: Path, tensors: Any, model: MllamaForConditionalGeneration, config: _Config) -> list[_Layer]:
    """The layers that a file changes, with tensors of the right shapes."""
    modules = dict(model.named_modules())
    embedding = decoder_parts(model).embed_tokens
    layers: dict[str, _Layer] = {}
    for tensor in tensors.keys():  # noqa: SIM118 - no mapping
        spelled, part = _parsed(file, tensor)
        name = current_name(f"{spelled}.{part}").removesuffix(f".{part}")
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Embedding) or (
            isinstance(module, nn.Embedding) and module is not embedding
        ):
            what = "has no such layer" if module is None else "can adapt only linear layers and the token embedding"
            raise AdapterError(f"{file}: {tensor}: the model {what} ({name})")
        layer = layers.setdefault(name, _Layer(spelled, name, module))
        if (other := layer.tensors.get(_PARTS[part])) is not None:
            raise AdapterError(f"{file}: {tensor}: is there twice, also as {other}")
        layer.tensors[_PARTS[part]] = tensor
        _check_tensor(file, tensors, layer, _PARTS[part], config)
    _check_complete(file, layers, modules, config)
    return [*layers.values()]


def _parsed(file: Path, tensor: str) -> tuple[str, str]:
    """The module of a tensor, as it is spelled, and the ending in `_PARTS`."""
    name = tensor.replace(".default.", ".")  # where the whole state was saved instead of the adapter
    if name.startswith(_PREFIX):
        for part in _PARTS:
            if name.endswith(f".{part}"):
                return name.removeprefix(_PREFIX).removesuffix(f".{part}"), part
    raise AdapterError(f"{file}: {tensor}: not a tensor of a LoRA; it must be {_PREFIX}LAYER and one of {[*_PARTS]}")


def _check_tensor(file: Path, tensors: Any, layer: _Layer, part: str, config: _Config) -> None:
    tensor, rank = layer.tensors[part], config.rank(layer.spelled)
    found = tensors.get_slice(tensor)
    expected = layer.shapes(rank).get(part)
    if expected is None:
        raise AdapterError(f"{file}: {tensor}: the layer of the model has no {part.removeprefix('up_')}")
    if tuple(found.get_shape()) != expected:
        by = f" with rank {rank} ({CONFIG_FILE})" if part in ("down", "up") else ""
        raise AdapterError(f"{file}: {tensor}: must be {[*expected]}{by}, got {found.get_shape()}")
    if found.get_dtype() not in _DTYPES:
        raise AdapterError(f"{file}: {tensor}: must be one of {sorted(_DTYPES)}, got {found.get_dtype()}")


def _check_complete(
    file: Path, layers: Mapping[str, _Layer], modules: Mapping[str, nn.Module], config: _Config
) -> None:
    for layer in layers.values():
        if ("down" in layer.tensors) != ("up" in layer.tensors):
            [tensor] = (layer.tensors[part] for part in ("down", "up") if part in layer.tensors)
            raise AdapterError(f"{file}: {tensor}: the other matrix of the layer is missing")
    with_lora = {name for name, layer in layers.items() if "down" in layer.tensors}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and config.must_target(name) and name not in with_lora:
            raise AdapterError(f"{file}: {name}: is one of target_modules ({CONFIG_FILE}), but has no tensors")
    for saved in config.modules_to_save:
        if not any(_is_named(name, [saved]) for name, layer in layers.items() if "weight" in layer.tensors):
            raise AdapterError(f"{file}: {saved}: is one of modules_to_save ({CONFIG_FILE}), but has no tensors")
    if not layers:
        raise AdapterError(f"{file}: holds no tensors")


def _change(file: Path, tensors: Any, layer: _Layer, config: _Config, dtype: torch.dtype) -> Change:
    module, scale = layer.module, config.scale(layer.spelled)
    device = module.weight.device

    def read(part: str, factor: float = 1.0) -> Tensor | None:
        """A tensor in float32, times a factor; None if there is none."""
        if part not in layer.tensors:
            return None
        values: Tensor = tensors.get_tensor(layer.tensors[part]).float() * factor
        if not values.to(dtype).isfinite().all():
            raise AdapterError(f"{file}: {layer.tensors[part]}: must be finite in {dtype}, has NaN or infinite values")
        return values

    weight, bias, up_bias = read("weight"), read("bias"), read("up_bias", scale)
    added = None if up_bias is None else up_bias.to(device)
    if bias is not None:
        assert isinstance(module, nn.Linear), "the embedding has no bias"
        more = bias.to(device) - module.bias.float()
        added = more if added is None else added + more
    if weight is not None and _is_same(module.weight, weight):
        weight = None  # PEFT saves the embeddings beside a LoRA of them, changed or not
    return Change(
        down=_placed(read("down"), dtype, device),
        up=_placed(read("up", scale), dtype, device),
        weight=_placed(weight, dtype, device),
        added=_placed(added, dtype, device),
    )


def _placed(values: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A copy, so that nothing refers to the file any more."""
    return None if values is None else values.to(device, dtype, copy=True)


def _is_same(weight: Tensor, other: Tensor) -> bool:
    return not weight.is_meta and weight.is_floating_point() and torch.equal(weight, other.to(weight))


def _is_named(module: str, names: list[str]) -> bool:
    """Whether a module has one of these names, or is the last part of it."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first regular expression that fits the end of a module's name, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
