"""Linear layers as functions of rows: how their weights are stored is known here alone."""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve import ops
from trimserve.models.int8 import int8_linear
from trimserve.models.weights import fused_scales, fused_weight

__all__ = ["FloatLinear", "Linear", "linear"]

_MOST_ROWS: Final = {torch.float32: 512, torch.float16: 512, torch.bfloat16: 8}
"""Up to so many rows `ops.linear` is faster than torch on a CPU (`benchmarks/results/ops.json`)."""


class Linear(Protocol):
    """Rows [R, columns] times the weights of one or several linear layers, [R, outputs], with its bias."""

    def __call__(self, rows: Tensor, /) -> Tensor:
        """The outputs of all layers, one after another."""


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """Weights of the rows' own dtype."""

    weight: Tensor
    """[outputs, columns], contiguous."""
    most_rows: int
    """Up to so many rows `ops.linear` is faster than torch."""
    bias: Tensor | None = None
    """[outputs]"""

    def __call__(self, rows: Tensor, /) -> Tensor:
        """[R, columns] -> [R, outputs]."""
        if len(rows) > self.most_rows:
            return F.linear(rows, self.weight, self.bias)
        product = ops.linear(rows, self.weight)
        return product if self.bias is None else product.add_(self.bias)


def linear(module: nn.Module, *names: str) -> Linear:
    """The linear layers `names` of a module as one, as `weights.load_weights` has stored them.

    Args:
        module: a part of the model.
        names: one name, or several without biases whose weights are rows of one tensor, see `weights.FUSED`.
    """
    weight = fused_weight(module, names)
    if weight.dtype == torch.int8:
        scales = fused_scales(module, names)
        return lambda rows: int8_linear(rows, weight, scales)
    first = module.get_submodule(names[0])
    assert isinstance(first, nn.Linear)
    return FloatLinear(weight, _MOST_ROWS[weight.dtype] if weight.device.type == "cpu" else 0, first.bias)
