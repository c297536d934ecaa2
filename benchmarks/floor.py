"""What bounds a decode step: the bytes that it must read, and its products; each over what this machine reaches.

The rate of products is that of as many rows with a part of a weight that the second cache holds, by torch or by
`ops.linear`, whichever is faster: what a product takes when memory is free.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import time_calls
from trimserve import ops
from trimserve.config import Quantize
from trimserve.model.checkpoint import open_checkpoint
from trimserve.model.int4 import to_int4
from trimserve.model.int8 import to_int8
from trimserve.model.transformers_mllama import step_modules
from trimserve.model.weights import empty_model, weight_bytes

__all__ = ["Floor", "StepShape"]

_CACHED_BYTES = 2**20
_QUANTIZED: Final = {"int8": to_int8, "int4": to_int4}
_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a decode step of any batch multiplies with."""

    dtype: torch.dtype
    quantize: Quantize
    weight_bytes: int
    """All weights but the embedding, of which rows are read, and the projections of visual features."""
    linears: tuple[tuple[int, int], ...]
    """(outputs, inputs) of every linear layer."""

    @classmethod
    def of_checkpoint(cls, folder: Path, dtype: torch.dtype, quantize: Quantize) -> "StepShape":
        """Of a checkpoint as `load_weights` stores it."""
        config = open_checkpoint(str(folder), None, with_weights=False).config
        return cls.of_model(empty_model(config, dtype, quantize), dtype, quantize)

    @classmethod
    def of_model(cls, model: Any, dtype: torch.dtype, quantize: Quantize = "none") -> "StepShape":
        """Of transformers' model with its weights as they are stored."""
        modules = [*step_modules(model)]
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        shapes = tuple((linear.out_features, linear.in_features) for linear in linears)
        return cls(dtype, quantize, weight_bytes(modules), shapes)


@dataclass(frozen=True, slots=True)
class Floor:
    """Least milliseconds of a step."""

    num_bytes: int
    bytes_ms: float
    products_ms: float

    @property
    def ms(self) -> float:
        """The larger."""
        return max(self.bytes_ms, self.products_ms)

    def beside(self, milliseconds: float) -> dict[str, float]:
        """The floor, and how many times as long a step took."""
        return {
            "bytes": self.num_bytes,
            "bytes_ms": round(self.bytes_ms, 3),
            "products_ms": round(self.products_ms, 3),
            "times_floor": round(milliseconds / self.ms, 3),
        }

    @classmethod
    def of_step(cls, shape: StepShape, batch: int, kv_bytes: int, bytes_per_second: float) -> "Floor":
        """Of a batch that attends to so many bytes."""
        num_bytes = shape.weight_bytes + kv_bytes
        sizes = {inputs for _, inputs in shape.linears}
        rates = {inputs: _product_rate(batch, inputs, shape.dtype, shape.quantize) for inputs in sizes}
        products = sum(2 * batch * outputs * inputs / rates[inputs] for outputs, inputs in shape.linears)
        return cls(num_bytes, num_bytes / bytes_per_second * 1e3, products * 1e3)


def _product_rate(rows: int, inputs: int, dtype: torch.dtype, quantize: Quantize) -> float:
    """Multiplications and additions per second."""
    outputs = _CACHED_BYTES // (inputs * torch.float32.itemsize)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs)
    floats = weight.to(dtype)
    stored = _QUANTIZED[quantize](weight) if quantize in _QUANTIZED else (floats,)
    calls = (lambda: F.linear(x, floats), lambda: ops.linear(x, *stored))
    fastest = min(time_calls(call, _SECONDS)["p10"] for call in calls)
    return 2 * rows * inputs * outputs / fastest * 1e3
