"""compressed-tensors' `float-quantized` and `int-quantized`: float8 or int8 weights, one scale per output or for all.

Checkpoints named FP8, FP8-dynamic and W8A8. What they say about quantizing activations is not followed: rows stay
floats, which is at least as exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimserve.model.formats.quantized_linear import FLOATS, LinearParts
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["NaiveInt8", "NaiveQuantized"]

_INT8 = "I8"
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class NaiveQuantized:
    """See `QuantizedLinear`."""

    weight: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None = None
    row_multiple: int = 1

    @classmethod
    def find(cls, parts: LinearParts) -> "NaiveQuantized | None":
        """The layer, if it is stored in this format.

        Raises:
            CheckpointError: a part that is missing or does not fit.
        """
        if "weight_scale" not in parts:
            return None
        outputs, _ = parts.shape
        shapes = ((outputs, 1), (outputs,), (1, 1), (1,), ())
        weight = parts.get("weight", (_INT8, *_FLOAT8), parts.shape)
        scale = parts.get("weight_scale", FLOATS, *shapes)
        zero_point = parts.find("weight_zero_point", (_INT8, "I32", *_FLOAT8, *FLOATS), *shapes)
        if weight.dtype == _INT8 and zero_point is None:
            return NaiveInt8(weight, scale)
        return cls(weight, scale, zero_point)

    def floats(self, rows: slice) -> Tensor:
        """See `QuantizedLinear`."""
        scale = _column(self.scale, rows)
        weight = self.weight.read(rows).to(scale.dtype)
        if self.zero_point is not None:
            weight -= _column(self.zero_point, rows).to(scale.dtype)
        return weight.mul_(scale)


class NaiveInt8(NaiveQuantized):
    """See `Int8Linear`."""

    __slots__ = ()

    def int8(self, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Int8Linear`."""
        weight, scale = self.weight.read(rows), _column(self.scale, rows).to(torch.float32)
        return weight, scale[:, 0].expand(len(weight))


def _column(tensor: StoredTensor, rows: slice) -> Tensor:
    """Values of rows [R, 1]; [1, 1] if all rows have the same."""
    is_per_output = bool(tensor.shape) and tensor.shape[0] > 1
    return (tensor.read(rows) if is_per_output else tensor.read()).reshape(-1, 1)
