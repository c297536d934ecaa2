"""Reads a safetensors checkpoint into a transformers model whose decoder weights share fused storage.

The model is built without memory, each parameter gets its place once, and the files are copied into those places
in slices that are unmapped again, so that loading takes the weights' bytes and one slice. Query, key and value
projections lie in one tensor (key and value in cross-attention layers, where queries come from other rows), gate
and up projections in another; transformers' own parameters are views of them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

from trimserve.errors import CheckpointError
from trimserve.models.checkpoint import read_json, text_config

__all__ = ["FUSED", "fused_weight", "load_weights"]

FUSED = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "cross_attn": ("k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
}
"""Linear layers of a decoder layer's module whose weights are rows of one tensor, in this order."""

_SLICE_BYTES = 8 << 20

# Names in checkpoints saved before transformers 4.52, Meta's among them, and what they are called now.
_RENAMED_PREFIXES = {
    "language_model.lm_head": "lm_head",
    "language_model.model": "model.language_model",
    "vision_model": "model.vision_model",
    "multi_modal_projector": "model.multi_modal_projector",
}


def load_weights(
    folder: Path, config: MllamaConfig, dtype: torch.dtype, device: torch.device
) -> MllamaForConditionalGeneration:
    """Build the model that a checkpoint folder describes.

    Args:
        folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`.
        config: the folder's `config.json`.
        dtype: of the parameters; the files may hold another.
        device: where the parameters go.
    Returns:
        The model in evaluation mode, without gradients.
    Raises:
        CheckpointError: no safetensors files, a parameter is missing or has another shape, or a tensor is unknown.
    """
    with torch.device("meta"):
        model: MllamaForConditionalGeneration = MllamaForConditionalGeneration._from_config(config, dtype=dtype)
    _give_storage(model, device)
    # Computed from the config, not stored: the one thing that the meta device has no values of.
    model.model.language_model.rotary_emb = MllamaRotaryEmbedding(text_config(config)).to(device)

    missing = dict(model.named_parameters())
    for file in _files(folder):
        try:
            _read_file(file, missing)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} parameters are in no file, the first is {min(missing)}")
    model.eval().requires_grad_(False)
    return model


def fused_weight(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The tensor [rows, columns] whose rows are the weights of a module's linear layers, in order; no copy."""
    weights = [module.get_submodule(name).weight for name in names]
    first = weights[0]
    assert isinstance(first, Tensor)
    num_rows = sum(weight.shape[0] for weight in weights if isinstance(weight, Tensor))
    return first.data.as_strided((num_rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def _give_storage(model: MllamaForConditionalGeneration, device: torch.device) -> None:
    for layer in model.model.language_model.layers:
        for module_name, names in FUSED.items():
            if hasattr(layer, module_name):
                _fuse(getattr(layer, module_name), names, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _fuse(module: nn.Module, names: tuple[str, ...], device: torch.device) -> None:
    linears = [module.get_submodule(name) for name in names]
    rows = [linear.weight.shape[0] for linear in linears if isinstance(linear, nn.Linear)]
    example = next(linears[0].parameters())
    storage = torch.empty(sum(rows), example.shape[1], dtype=example.dtype, device=device)
    for linear, part in zip(linears, storage.split(rows), strict=True):
        linear.weight = nn.Parameter(part)


def _files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: must have an object weight_map")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: no {name}; only safetensors checkpoints are read")
        yield folder / name


def _read_file(file: Path, missing: dict[str, nn.Parameter]) -> None:
    """Fill the parameters that a file holds and take them out of `missing`."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    for name in names:
        parameter = missing.pop(_current_name(name), None)
        if parameter is None:
            raise CheckpointError(f"{file.name}: tensor {name} is not part of an Mllama with this config.json")
        _read(file, name, parameter.data)


def _current_name(name: str) -> str:
    for old, new in _RENAMED_PREFIXES.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _read(file: Path, name: str, target: Tensor) -> None:
    """Copy one tensor in slices of rows; reopening unmaps what was read, which else stays resident."""
    with safe_open(file, framework="pt") as tensors:
        shape = tuple(tensors.get_slice(name).get_shape())
    if shape != tuple(target.shape):
        raise CheckpointError(f"{file.name}: {name} must be {list(target.shape)}, got {list(shape)}")
    row_bytes = max(1, target[:1].numel() * target.element_size())
    num_rows = max(1, _SLICE_BYTES // row_bytes)
    for start in range(0, shape[0], num_rows):
        with safe_open(file, framework="pt") as tensors:
            target[start : start + num_rows] = tensors.get_slice(name)[start : start + num_rows]
