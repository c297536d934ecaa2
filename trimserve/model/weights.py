"""Reads a safetensors checkpoint into a transformers model in which weights that are used together share storage.

The model is built without memory, each parameter gets its place once, and the files are copied into those places
in slices that are unmapped again, so that loading takes the weights' bytes and one slice; int8 weights are quantized
slice by slice. Query, key and value projections lie in one tensor (key and value in cross-attention layers, where
queries come from other rows), the decoder's gate and up projections in another; transformers' own parameters are views
of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MllamaConfig

from trimserve.config import Quantize
from trimserve.errors import CheckpointError
from trimserve.model import huge_pages
from trimserve.model.checkpoint import read_json
from trimserve.model.int8 import SCALES, make_int8, to_int8
from trimserve.model.transformers_mllama import (
    MllamaForConditionalGeneration,
    compute_rotary,
    fused_linears,
    meta_model,
)

__all__ = [
    "allocated_model",
    "current_name",
    "empty_model",
    "fuse",
    "fused_scales",
    "fused_weight",
    "load_weights",
    "weight_bytes",
]

_SLICE_BYTES = 8 << 20

# Names in checkpoints saved before transformers 4.52, Meta's among them, and what they are called now.
_RENAMED_PREFIXES = {
    "language_model.lm_head": "lm_head",
    "language_model.model": "model.language_model",
    "vision_model": "model.vision_model",
    "multi_modal_projector": "model.multi_modal_projector",
}


def load_weights(
    folder: Path,
    config: MllamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
) -> MllamaForConditionalGeneration:
    """Build the model that a checkpoint folder describes.

    Args:
        folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`.
        config: the folder's `config.json`.
        dtype: of the parameters; the files may hold another.
        device: where the parameters go.
        quantize: as in `ModelConfig`.
    Returns:
        The model in evaluation mode, without gradients.
    Raises:
        CheckpointError: no safetensors files, a parameter is missing or has another shape, or a tensor is unknown.
    """
    model = allocated_model(config, dtype, device, quantize)
    missing = dict(model.named_parameters())
    scales = dict(_scales(model))
    for file in _files(folder):
        try:
            _read_file(file, missing, scales)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} parameters are in no file, the first is {min(missing)}")
    return model


def allocated_model(
    config: MllamaConfig, dtype: torch.dtype, device: torch.device, quantize: Quantize = "none"
) -> MllamaForConditionalGeneration:
    """The model of a config as `load_weights` returns it, but its parameters have no values yet."""
    model = empty_model(config, dtype, quantize)
    _give_storage(model, device)
    compute_rotary(model, device)
    model.eval().requires_grad_(False)
    return model


def empty_model(
    config: MllamaConfig, dtype: torch.dtype, quantize: Quantize = "none"
) -> MllamaForConditionalGeneration:
    """The model of a config on the meta device: shapes and dtypes without memory."""
    model = meta_model(config, dtype)
    if quantize == "int8":
        make_int8(model)
    return model


def weight_bytes(model: MllamaForConditionalGeneration) -> int:
    """Bytes of a model's parameters and scales."""
    scales = (scale for _, scale in _scales(model))
    return sum(tensor.nbytes for tensor in (*model.parameters(), *scales))


def fuse(linears: Sequence[nn.Linear], device: torch.device) -> None:
    """Give linear layers weights, and scales where they have some, that are rows of one tensor.

    The new weights hold no values yet.
    """
    rows = [linear.weight.shape[0] for linear in linears]
    example = linears[0].weight
    storage = huge_pages.empty((sum(rows), example.shape[1]), example.dtype, device)
    for linear, part in zip(linears, storage.split(rows), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    if hasattr(linears[0], SCALES):
        scales = torch.empty(sum(rows), dtype=torch.float32, device=device)
        for linear, of_linear in zip(linears, scales.split(rows), strict=True):
            setattr(linear, SCALES, of_linear)


def fused_weight(linears: Sequence[nn.Linear]) -> Tensor:
    """The tensor [rows, columns] whose rows are the weights of linear layers, in order; no copy."""
    return _fused([linear.weight for linear in linears])


def fused_scales(linears: Sequence[nn.Linear]) -> Tensor:
    """The same of the scales [rows] of int8 weights."""
    return _fused([getattr(linear, SCALES) for linear in linears])


def _fused(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0].detach()
    num_rows = sum(len(part) for part in parts)
    return first.as_strided((num_rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _scales(model: MllamaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """Scales by the name of their weight."""
    for name, buffer in model.named_buffers():
        if name.endswith(SCALES):
            yield name.removesuffix(SCALES) + "weight", buffer


def _give_storage(model: MllamaForConditionalGeneration, device: torch.device) -> None:
    for linears in fused_linears(model):
        fuse(linears, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                place = huge_pages.empty(parameter.shape, parameter.dtype, device)
                setattr(module, name, nn.Parameter(place, requires_grad=False))
        scale = getattr(module, SCALES, None)
        if scale is not None and scale.is_meta:
            setattr(module, SCALES, torch.empty_like(scale, device=device))


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


def _read_file(file: Path, missing: dict[str, nn.Parameter], scales: Mapping[str, Tensor]) -> None:
    """Fill the parameters that a file holds, and their scales, and take them out of `missing`."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    for name in names:
        parameter = missing.pop(current_name(name), None)
        if parameter is None:
            raise CheckpointError(f"{file.name}: tensor {name} is not part of an Mllama with this config.json")
        _read(file, name, parameter.data, scales.get(current_name(name)))


def current_name(name: str) -> str:
    """What transformers calls a tensor today, of its name today or before 4.52."""
    for old, new in _RENAMED_PREFIXES.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _read(file: Path, name: str, target: Tensor, scales: Tensor | None) -> None:
    """Copy one tensor in slices of rows; reopening unmaps what was read, which else stays resident.

    With scales, the tensor is quantized.
    """
    with safe_open(file, framework="pt") as tensors:
        shape = tuple(tensors.get_slice(name).get_shape())
    if shape != tuple(target.shape):
        raise CheckpointError(f"{file.name}: {name} must be {list(target.shape)}, got {list(shape)}")
    row_bytes = max(1, target[:1].numel() * torch.float32.itemsize)
    num_rows = max(1, _SLICE_BYTES // row_bytes)
    for start in range(0, shape[0], num_rows):
        part = slice(start, start + num_rows)
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice(name)[part]
        if scales is None:
            target[part] = rows
        else:
            target[part], scales[part] = to_int8(rows)
