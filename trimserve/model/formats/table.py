"""Which linear layers of a checkpoint are quantized, and how: told by the names of their tensors.

Lists of skipped modules in `quantization_config` are not read, because they name modules as they were once called.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trimserve.errors import CheckpointError
from trimserve.model.formats.bnb_4bit import Bnb4Bit
from trimserve.model.formats.bnb_int8 import BnbInt8
from trimserve.model.formats.gptq import Gptq
from trimserve.model.formats.naive_quantized import NaiveQuantized
from trimserve.model.formats.pack_quantized import PackQuantized
from trimserve.model.formats.quantized_linear import LinearParts, QuantizedLinear
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["METHODS", "check_method", "quantized_linears"]

METHODS: Final = ("compressed-tensors", "bitsandbytes", "gptq", "auto-round")
"""Values of `quant_method` whose checkpoints are read."""

# Parts of a linear layer that are parameters where nothing is quantized.
_PLAIN = {"weight", "bias"}

# Of quantized activations and caches, which are not followed.
_OF_ACTIVATIONS = re.compile(r"(input|output)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point)")


def check_method(file: Path, config: Any) -> None:
    """Look at `quantization_config`.

    Args:
        file: where it stands.
        config: its value, any JSON; null and nothing mean that nothing is quantized.
    Raises:
        CheckpointError: a method that is not read.
    """
    if not config:
        return
    method = config.get("quant_method") if isinstance(config, dict) else config
    if isinstance(config, dict) and method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # before transformers named methods
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise CheckpointError(f"{file}: quantization_config with quant_method {method} is not supported: {known} are")


def quantized_linears(
    shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[dict[str, QuantizedLinear], set[str]]:
    """Find the quantized linear layers of a checkpoint.

    Args:
        shapes: [outputs, inputs] of every linear layer of the model.
        tensors: of the checkpoint.
        config: `quantization_config`, empty if there is none.
    Returns:
        The layers by name, and the names of all tensors that belong to them or to quantized activations.
    Raises:
        CheckpointError: parts that are missing or do not fit.
    """
    of_layers: dict[str, dict[str, StoredTensor]] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        layer, part = _split(name, shapes)
        if _OF_ACTIVATIONS.fullmatch(part):
            used.add(name)
        elif layer is not None:
            of_layers.setdefault(layer, {})[part] = tensor
    found: dict[str, QuantizedLinear] = {}
    for layer, of_layer in of_layers.items():
        parts = LinearParts(layer, shapes[layer], of_layer)
        linear = _find(parts, config)
        if linear is not None:
            found[layer] = linear
            used.update(f"{layer}.{part}" for part in parts.used)
    return found, used


def _find(parts: LinearParts, config: Mapping[str, Any]) -> QuantizedLinear | None:
    if _PLAIN.issuperset(parts):
        return None
    return (
        PackQuantized.find(parts)
        or Gptq.find(parts, config)
        or BnbInt8.find(parts)
        or NaiveQuantized.find(parts)
        or Bnb4Bit.find(parts)
    )


def _split(name: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[str | None, str]:
    """The linear layer that a tensor belongs to, and what follows; None and the last word if there is none."""
    layer = name
    while "." in layer:
        layer = layer.rpartition(".")[0]
        if layer in shapes:
            return layer, name.removeprefix(f"{layer}.")
    return None, name.rpartition(".")[2]
