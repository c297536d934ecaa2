"""Weight-only int8: each output of a linear layer is stored as int8 numbers and one float32 scale.

The largest magnitude of a row becomes 127, so that a row can be quantized without the others. Rows that are multiplied
keep their dtype, as do embeddings, norms, gates, the vision encoder, keys and values.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SCALES", "make_int8", "multiply_int8", "to_int8"]

SCALES = "weight_scales"
"""Name of a quantized linear layer's buffer float32 [outputs], beside its int8 `weight`."""

_LARGEST = 127


def make_int8(linears: Iterable[nn.Module]) -> None:
    """Give linear layers int8 weights, and scales.

    Args:
        linears: on the meta device: what is stored is still to come.
    """
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        linear.register_buffer(SCALES, torch.empty(linear.out_features, dtype=torch.float32, device="meta"))


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize weights, [R, columns] of any float dtype.

    Returns:
        int8 [R, columns] and scales float32 [R], whose product differs from the weights by at most half a scale.
        Weights that are not finite give scales that are not.
    """
    exact = rows.float()
    scales = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (exact / scales[:, None]).round().to(torch.int8), scales


def multiply_int8(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Rows [R, columns] times quantized weights, for many rows: the weights are made floats first.

    Args:
        rows: float32, bfloat16 or float16.
        weight: int8 [outputs, columns].
        scales: float32 [outputs].
    Returns:
        [R, outputs] of the rows' dtype.
    """
    dtype = torch.bfloat16 if rows.dtype == torch.float16 else rows.dtype  # sums of int8 weights overflow float16
    product = F.linear(rows.to(dtype), weight.to(dtype))
    return (product * scales).to(rows.dtype)
