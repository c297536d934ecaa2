"""Reads a safetensors checkpoint into a transformers model in which weights that are used together share storage.

The model is built without memory, each parameter gets its place once, and the files are copied into those places
in slices that are unmapped again, so that loading takes the weights' bytes and one slice; int8 and int4 weights are
quantized slice by slice. Query, key and value projections lie in one tensor (key and value in cross-attention layers,
where queries come from other rows), the decoder's gate and up projections in another; transformers' own parameters are
views of them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MllamaConfig

from trimserve.config import Quantize
from trimserve.errors import CheckpointError
from trimserve.model import huge_pages
from trimserve.model.checkpoint import read_json
from trimserve.model.quantization import SCALES, is_quantized, quantize_decoder, quantized_rows
from trimserve.model.transformers_mllama import (
    MllamaForConditionalGeneration,
    compute_rotary,
    fused_linears,
    meta_model,
)

__all__ = [
    "allocated_model",
    "empty_model",
    "fuse",
    "fused_scales",
    "fused_weight",
    "load_weights",
    "num_parameters",
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
    missing = dict(_places(model))
    for file in _files(folder):
        try:
            _read_file(file, missing)
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
    quantize_decoder(model, quantize)
    return model


def num_parameters(model: MllamaForConditionalGeneration) -> int:
    """Numbers that a model's checkpoint holds, however it is stored."""
    return sum(math.prod(place.shape) for _, place in _places(model))


def weight_bytes(model: MllamaForConditionalGeneration) -> int:
    """Bytes of a model's parameters and scales."""
    places = [place for _, place in _places(model)]
    return sum(place.weight.nbytes + (0 if place.scales is None else place.scales.nbytes) for place in places)


def fuse(linears: Sequence[nn.Linear], device: torch.device) -> None:
    """Give linear layers weights, and scales where they have some, that are rows of one tensor.

    The new weights hold no values yet.
    """
    rows = [linear.weight.shape[0] for linear in linears]
    example = linears[0].weight
    storage = huge_pages.empty((sum(rows), example.shape[1]), example.dtype, device)
    for linear, part in zip(linears, storage.split(rows), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    if is_quantized(example):
        of_first = getattr(linears[0], SCALES)
        scales = torch.empty((sum(rows), *of_first.shape[1:]), dtype=of_first.dtype, device=device)
        for linear, of_linear in zip(linears, scales.split(rows), strict=True):
            setattr(linear, SCALES, of_linear)


def fused_weight(linears: Sequence[nn.Linear]) -> Tensor:
    """The tensor [rows, columns] whose rows are the weights of linear layers, in order; no copy."""
    return _fused([linear.weight for linear in linears])


def fused_scales(linears: Sequence[nn.Linear]) -> Tensor:
    """The same of the scales [rows, ...] of quantized weights."""
    return _fused([getattr(linear, SCALES) for linear in linears])


def _fused(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0].detach()
    num_rows = sum(len(part) for part in parts)
    return first.as_strided((num_rows, *first.shape[1:]), first.stride(), first.storage_offset())


class _Place(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    weight: Tensor
    scales: Tensor | None
    """Of a quantized weight."""
    shape: tuple[int, ...]
    """In the checkpoint."""


def _places(model: MllamaForConditionalGeneration) -> Iterator[tuple[str, _Place]]:
    """By the names of the parameters."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            scales = getattr(module, SCALES, None) if is_quantized(parameter) else None
            shape = tuple(parameter.shape)
            if scales is not None:
                assert isinstance(module, nn.Linear)
                shape = (module.out_features, module.in_features)
            yield name, _Place(parameter.data, scales, shape)


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


def _read_file(file: Path, missing: dict[str, _Place]) -> None:
    """Fill the places of what a file holds, and take them out of `missing`."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
    for name in names:
        place = missing.pop(_current_name(name), None)
        if place is None:
            raise CheckpointError(f"{file.name}: tensor {name} is not part of an Mllama with this config.json")
        _read(file, name, place)


def _current_name(name: str) -> str:
    for old, new in _RENAMED_PREFIXES.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _read(file: Path, name: str, place: _Place) -> None:
    """Copy one tensor in slices of rows, or quantize it; reopening unmaps what was read, which else stays resident."""
    with safe_open(file, framework="pt") as tensors:
        shape = tuple(tensors.get_slice(name).get_shape())
    if shape != place.shape:
        raise CheckpointError(f"{file.name}: {name} must be {list(place.shape)}, got {list(shape)}")
    row_bytes = max(1, math.prod(shape[1:]) * torch.float32.itemsize)
    num_rows = max(1, _SLICE_BYTES // row_bytes)
    for start in range(0, shape[0], num_rows):
        part = slice(start, start + num_rows)
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice(name)[part]
        if place.scales is None:
            place.weight[part] = rows
        else:
            place.weight[part], place.scales[part] = quantized_rows(rows, place.weight.dtype)
