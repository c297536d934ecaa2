"""Reads a checkpoint's tensors into a transformers model in which weights that are used together share storage.

The model is built without memory, each parameter gets its place once, and the files are copied into those places
in slices that are unmapped again, so that loading takes the weights' bytes and one slice; what is quantized, by the
checkpoint or here, passes slice by slice too. Query, key and value projections lie in one tensor (key and value in
cross-attention layers, where queries come from other rows), the decoder's gate and up projections in another;
transformers' own parameters are views of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import MllamaConfig

from trimserve.config import Quantize
from trimserve.errors import CheckpointError
from trimserve.model import huge_pages
from trimserve.model.formats.quantized_linear import FLOATS, Int4Linear, Int8Linear, QuantizedLinear
from trimserve.model.formats.table import quantized_linears
from trimserve.model.int4 import pack_int4
from trimserve.model.quantization import (
    INT8,
    SCALES,
    WeightFormat,
    int4_format,
    is_quantized,
    quantize_decoder,
    quantized_rows,
)
from trimserve.model.ranks import UNSHARDED, Shard
from trimserve.model.sharding import WHOLE, Share, shard_decoder, shares
from trimserve.model.stored_tensors import StoredTensor, row_slices, stored_tensors
from trimserve.model.transformers_mllama import (
    MllamaForConditionalGeneration,
    compute_rotary,
    decoder_linears,
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
    "stored_formats",
    "weight_bytes",
]


def load_weights(
    folder: Path,
    config: MllamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
    shard: Shard = UNSHARDED,
) -> MllamaForConditionalGeneration:
    """Build the model that a checkpoint folder describes.

    Args:
        folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`.
        config: the folder's `config.json`.
        dtype: of the parameters; the files may hold another.
        device: where the parameters go.
        quantize: as in `ModelConfig`.
        shard: what is read of it.
    Returns:
        The model in evaluation mode, without gradients.
    Raises:
        CheckpointError: see `stored_tensors`; or a parameter is missing or has another shape or a dtype that is none of
            floats, a tensor is unknown, or parts of a quantized layer do not fit.
    """
    tensors = stored_tensors(folder)
    described = meta_model(config, dtype)
    quantized, used = _quantized(described, tensors)
    shapes = {name: place.shape for name, place in _places(described)}
    unknown = tensors.keys() - shapes.keys() - used
    if unknown:
        raise CheckpointError(f"{tensors[min(unknown)]} is not part of an Mllama with this config.json")
    plain = [name for name in shapes if name.removesuffix(".weight") not in quantized]
    missing = [name for name in plain if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} parameters are in no file, the first is {min(missing)}")
    for name in plain:  # first, because a config.json of a larger model would take its memory
        _check(tensors[name], shapes[name])
    stored = _stored_formats(described, quantized) if device.type == "cpu" else {}
    model = allocated_model(config, dtype, device, quantize, stored, shard)
    of_rank = shares(described, shard)
    for name, place in _places(model):
        layer = quantized.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
        share = of_rank.get(name.removesuffix(".weight"), WHOLE)
        if layer is not None:
            _read_quantized(layer, place, share)
        else:
            _read(tensors[name], place, share)
    return model


def stored_formats(config: MllamaConfig, tensors: Mapping[str, StoredTensor]) -> Mapping[str, WeightFormat]:
    """Formats of the decoder's linear layers that stay as the checkpoint has them, by name; on a CPU only.

    Args:
        config: of the checkpoint.
        tensors: of the checkpoint.
    Raises:
        CheckpointError: parts of a quantized layer do not fit.
    """
    if not tensors:
        return {}
    model = meta_model(config, torch.float32)
    return _stored_formats(model, _quantized(model, tensors)[0])


def allocated_model(
    config: MllamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
    stored: Mapping[str, WeightFormat] | None = None,
    shard: Shard = UNSHARDED,
) -> MllamaForConditionalGeneration:
    """The model of a config as `load_weights` returns it, but its parameters have no values yet."""
    model = empty_model(config, dtype, quantize, stored, shard)
    _give_storage(model, device)
    compute_rotary(model, device)
    model.eval().requires_grad_(False)
    return model


def empty_model(
    config: MllamaConfig,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    stored: Mapping[str, WeightFormat] | None = None,
    shard: Shard = UNSHARDED,
) -> MllamaForConditionalGeneration:
    """The model of a config on the meta device: shapes and dtypes without memory.

    Args:
        config: of the checkpoint.
        dtype: of what is not quantized.
        quantize: as in `ModelConfig`.
        stored: see `stored_formats`; None if no layer stays as the checkpoint has it.
        shard: what is left of it.
    """
    model = meta_model(config, dtype)
    shard_decoder(model, shard)
    quantize_decoder(model, quantize, stored or {})
    return model


def num_parameters(model: MllamaForConditionalGeneration) -> int:
    """Numbers that a model's weights are, however they are stored."""
    return sum(math.prod(place.shape) for _, place in _places(model))


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own parameters and scales; `model.modules()` are all of a model."""
    tensors = [[*module.parameters(recurse=False), getattr(module, SCALES, None)] for module in modules]
    return sum(tensor.nbytes for own in tensors for tensor in own if tensor is not None)


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
    """Where a weight of a checkpoint goes."""

    weight: Tensor
    scales: Tensor | None
    """Of a quantized weight."""
    shape: tuple[int, ...]
    """As floats."""


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


def _quantized(
    model: MllamaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, QuantizedLinear], set[str]]:
    """See `quantized_linears`."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return quantized_linears(shapes, tensors, getattr(model.config, "quantization_config", None) or {})


def _stored_formats(
    model: MllamaForConditionalGeneration, quantized: Mapping[str, QuantizedLinear]
) -> dict[str, WeightFormat]:
    """See `stored_formats`: the decoder's layers stay if all have one format, because some of them share storage.

    The output layer counts by itself.
    """
    names = {module: name for name, module in model.named_modules()}
    *of_layers, output = (names[linear] for linear in decoder_linears(model))
    formats = {name: _format(quantized.get(name)) for name in (*of_layers, output)}
    if len({formats[name] for name in of_layers}) > 1:
        formats = {output: formats[output]}
    return {name: stored for name, stored in formats.items() if stored is not None}


def _format(layer: QuantizedLinear | None) -> WeightFormat | None:
    """How a layer is multiplied as it is stored, if it is."""
    if isinstance(layer, Int8Linear):
        return INT8
    return int4_format(layer.scale_dtype, layer.group_size) if isinstance(layer, Int4Linear) else None


def _check(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not the floats of this shape."""
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in (*FLOATS, "F64"):
        raise CheckpointError(f"{tensor} is {tensor.dtype} without the scales of a quantized weight beside it")


def _read(tensor: StoredTensor, place: _Place, share: Share) -> None:
    """Copy a share of one tensor, and quantize it if there are scales."""
    for part in row_slices(place.shape):
        rows = _rows(part, share)
        if place.scales is None and share.columns != WHOLE.columns:
            place.weight[part] = tensor.read(rows, share.columns)
        else:
            _store(tensor.read(rows), place, part, share)


def _read_quantized(layer: QuantizedLinear, place: _Place, share: Share) -> None:
    """The same of a quantized layer; what fits is stored as it is."""
    scales, multiple = place.scales, layer.row_multiple
    if (share.rows.start or 0) % multiple:
        raise CheckpointError(f"tensor_parallel must cut quantized rows at multiples of {multiple}, got {share.rows}")
    for part in row_slices(place.shape, multiple):
        rows = _rows(part, share)
        if scales is not None and place.weight.dtype == torch.int8 and isinstance(layer, Int8Linear):
            numbers, scales[part] = layer.int8(rows)
            place.weight[part] = numbers[:, share.columns]
        elif scales is not None and isinstance(layer, Int4Linear) and _fits(layer, place, scales):
            numbers, scales[part] = layer.int4(rows)
            place.weight[part] = pack_int4(numbers)
        else:
            _store(layer.floats(rows), place, part, share)


def _fits(layer: Int4Linear, place: _Place, scales: Tensor) -> bool:
    outputs, inputs = place.shape
    groups = (outputs, inputs // layer.group_size)
    return place.weight.dtype == torch.uint8 and (scales.dtype, scales.shape) == (layer.scale_dtype, groups)


def _rows(part: slice, share: Share) -> slice:
    """Where rows of a share lie in the whole tensor."""
    start = share.rows.start or 0
    return slice(start + part.start, start + part.stop)


def _store(floats: Tensor, place: _Place, part: slice, share: Share) -> None:
    """Store whole rows, from which scales are made, as far as they are in the share."""
    if place.scales is None:
        place.weight[part] = floats if share is WHOLE else floats[:, share.columns]
    else:
        numbers, place.scales[part] = quantized_rows(floats, place.weight.dtype)
        place.weight[part] = numbers[:, share.columns]
