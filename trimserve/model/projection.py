"""Linear layers of a checkpoint as functions of rows; only this file knows how their weights are stored."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve import ops
from trimserve.model.adapters import RowAdapters
from trimserve.model.quantization import is_quantized, multiply_int8
from trimserve.model.ranks import ALONE, Ranks
from trimserve.model.weights import fused_scales, fused_weight

__all__ = ["Projection", "projection_of"]

_MOST_ROWS: Final = {torch.float32: math.inf, torch.float16: 512, torch.bfloat16: 48}
"""Up to so many rows `ops.linear` is taken on a CPU: beyond, torch's products of bfloat16 are as fast."""

_BLOCK: Final = 512
"""Rows, see `Projection.row_by_row`."""

_MANY: Final = 49
"""Rows from which on `ops.linear` multiplies in one way, whatever the weights are."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Rows [R, columns] times the weights of one or several linear layers, [R, outputs], with its bias."""

    weight: Tensor
    """[outputs, columns], contiguous; of the rows' dtype, or int8 or int4 as `ops.linear` takes it."""
    scales: Tensor | None = None
    """Of int8 or int4 weights."""
    bias: Tensor | None = None
    """[outputs]"""
    linears: tuple[nn.Linear, ...] = ()
    """The layers, by which adapters know them."""
    ranks: Ranks = ALONE
    """Each of which multiplies its part of the columns, without a bias; the outputs are the sum of their products."""

    def __call__(self, rows: Tensor, adapters: RowAdapters | None = None, /) -> Tensor:
        """The outputs of all layers, one after another.

        Args:
            rows: [R, columns].
            adapters: of the rows; None if all of them are the base model's.
        """
        product = self.ranks.sum(self._product(rows))
        if adapters is not None:
            adapters.change(product, rows, self.linears)
        return product

    def row_by_row(self, rows: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """The same, but on a CPU the outputs of a row do not depend on the other rows, to the last bit (ADR-0017).

        `ops.linear` promises that for `_MANY` rows and more, and is not slower with many float32 rows. torch takes
        other loops for what is left over of a block of rows, and for few rows, so it always gets whole blocks.
        """
        if self.weight.device.type != "cpu":
            return self(rows, adapters)
        if adapters is None and self.most_rows(rows.dtype) >= _BLOCK:
            num_missing = max(0, _MANY - len(rows))
            product = ops.linear(F.pad(rows, (0, 0, 0, num_missing)), self.weight, self.scales)[: len(rows)]
            return product if self.bias is None else product.add_(self.bias)
        return self(F.pad(rows, (0, 0, 0, -len(rows) % _BLOCK)), adapters)[: len(rows)]

    def _product(self, rows: Tensor) -> Tensor:
        if len(rows) <= self.most_rows(rows.dtype):
            product = ops.linear(rows, self.weight, self.scales)
        elif self.scales is None:
            return F.linear(rows, self.weight, self.bias)
        else:
            product = multiply_int8(rows, self.weight, self.scales)
        return product if self.bias is None else product.add_(self.bias)

    def added_to(self, rows: Tensor, inputs: Tensor, gate: float = 1.0, adapters: RowAdapters | None = None) -> Tensor:
        """Add the outputs, times a factor, to rows.

        Args:
            rows: [R, outputs]; on a GPU they may be changed in place, by the product's own kernel.
            inputs: [R, columns].
            gate: the factor.
            adapters: as in `__call__`.
        Returns:
            [R, outputs]
        """
        is_plain = self.scales is None and self.bias is None and self.ranks is ALONE
        if rows.is_cuda and is_plain and adapters is None:
            return rows.addmm_(inputs, self.weight.T, alpha=gate)
        return rows.add(self(inputs, adapters), alpha=gate)

    def most_rows(self, dtype: torch.dtype) -> float:
        """Up to so many rows of a dtype `ops.linear` is taken: of quantized weights any number, but on a GPU none."""
        if self.weight.device.type != "cpu":
            return 0
        return _MOST_ROWS[dtype] if self.scales is None else math.inf


def projection_of(*layers: nn.Linear, ranks: Ranks = ALONE) -> Projection:
    """Take linear layers as one, as `weights.load_weights` stored them.

    Args:
        layers: one, or several without biases whose weights are rows of one tensor, see `weights.fuse`.
        ranks: that have columns of the weight each; `ALONE` if this one has all of them.
    """
    weight = fused_weight(layers)
    return Projection(weight, fused_scales(layers) if is_quantized(weight) else None, layers[0].bias, layers, ranks)
