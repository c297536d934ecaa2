"""Reads a checkpoint's tensors into a transformers model in which weights that are used together share storage.

The model is built without memory, each parameter gets its place once, and the files are copied into those places
in slices that are unmapped again, so that loading takes the weights' bytes and one slice; what is quantized, by the
checkpoint or here, passes slice by slice too. Query, key and value projections lie in one tensor (key and value in
cross-attention layers, where queries come from other rows), the decoder's gate and up projections in another;
transformers' own parameters are views of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MllamaConfig

from trimserve.config import Quantize
from trimserve.errors import CheckpointError
from trimserve.model import huge_pages
from trimserve.model.formats.quantized_linear import FLOATS, Int8Linear, QuantizedLinear
from trimserve.model.formats.table import quantized_linears
from trimserve.model.int8 import SCALES, make_int8, to_int8
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
    "stored_int8",
    "weight_bytes",
]


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
        CheckpointError: see `stored_tensors`; or a parameter is missing or has another shape or a dtype that is none of
            floats, a tensor is unknown, or parts of a quantized layer do not fit.
    """
    tensors = stored_tensors(folder)
    described = meta_model(config, dtype)
    quantized, used = _quantized(described, tensors)
    kept = _int8_layers(described, quantized) if device.type == "cpu" else ()
    model = allocated_model(config, dtype, device, quantize, kept)
    parameters, scales = dict(model.named_parameters()), dict(_scales(model))
    unknown = tensors.keys() - parameters.keys() - used
    if unknown:
        raise CheckpointError(f"{tensors[min(unknown)]} is not part of an Mllama with this config.json")
    missing = [name for name in parameters if name not in tensors and name.removesuffix(".weight") not in quantized]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} parameters are in no file, the first is {min(missing)}")
    for name, parameter in parameters.items():
        layer = quantized.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
        if layer is not None:
            _read_quantized(layer, parameter.data, scales.get(name))
        else:
            _read(tensors[name], parameter.data, scales.get(name))
    return model


def stored_int8(config: MllamaConfig, tensors: Mapping[str, StoredTensor]) -> Collection[str]:
    """Names of the decoder's linear layers that stay as the checkpoint stores them, in int8; on a CPU only.

    Args:
        config: of the checkpoint.
        tensors: of the checkpoint.
    Raises:
        CheckpointError: parts of a quantized layer do not fit.
    """
    if not tensors:
        return ()
    model = meta_model(config, torch.float32)
    return _int8_layers(model, _quantized(model, tensors)[0])


def allocated_model(
    config: MllamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
    int8_layers: Collection[str] = (),
) -> MllamaForConditionalGeneration:
    """The model of a config as `load_weights` returns it, but its parameters have no values yet."""
    model = empty_model(config, dtype, quantize, int8_layers)
    _give_storage(model, device)
    compute_rotary(model, device)
    model.eval().requires_grad_(False)
    return model


def empty_model(
    config: MllamaConfig, dtype: torch.dtype, quantize: Quantize = "none", int8_layers: Collection[str] = ()
) -> MllamaForConditionalGeneration:
    """The model of a config on the meta device: shapes and dtypes without memory.

    Args:
        config: of the checkpoint.
        dtype: of what is not quantized.
        quantize: as in `ModelConfig`.
        int8_layers: names of layers that are int8 in the checkpoint and stay so, see `stored_int8`.
    """
    model = meta_model(config, dtype)
    make_int8(decoder_linears(model) if quantize == "int8" else map(model.get_submodule, int8_layers))
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


def _quantized(
    model: MllamaForConditionalGeneration, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, QuantizedLinear], set[str]]:
    """See `quantized_linears`."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return quantized_linears(shapes, tensors, getattr(model.config, "quantization_config", None) or {})


def _int8_layers(model: MllamaForConditionalGeneration, quantized: Mapping[str, QuantizedLinear]) -> list[str]:
    """See `stored_int8`: all layers of the decoder or none, because a step runs them as one; the output layer alone."""
    names = {module: name for name, module in model.named_modules()}
    *of_layers, output = (names[linear] for linear in decoder_linears(model))
    are_int8 = all(isinstance(quantized.get(name), Int8Linear) for name in of_layers)
    return [
        *(of_layers if are_int8 else ()),
        *([output] if isinstance(quantized.get(output), Int8Linear) else ()),
    ]


def _read(tensor: StoredTensor, target: Tensor, scales: Tensor | None) -> None:
    """Copy one tensor, and quantize it if there are scales."""
    if tensor.shape != tuple(target.shape):
        raise CheckpointError(f"{tensor} must be {list(target.shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in (*FLOATS, "F64"):
        raise CheckpointError(f"{tensor} is {tensor.dtype} without the scales of a quantized weight beside it")
    for part in row_slices(tensor.shape):
        _store(tensor.read(part), target, scales, part)


def _read_quantized(layer: QuantizedLinear, target: Tensor, scales: Tensor | None) -> None:
    """The same of a quantized layer; what fits is stored as it is.

    Whoever adds a way to multiply other numbers unchanged, such as int4, copies them here.
    """
    for part in row_slices(tuple(target.shape), layer.row_multiple):
        if scales is not None and isinstance(layer, Int8Linear):
            target[part], scales[part] = layer.int8(part)
        else:
            _store(layer.floats(part), target, scales, part)


def _store(floats: Tensor, target: Tensor, scales: Tensor | None, part: slice) -> None:
    if scales is None:
        target[part] = floats
    else:
        target[part], scales[part] = to_int8(floats)
