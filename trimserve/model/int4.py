"""Weight-only int4: groups of 64 inputs of each output share a scale, half a byte for each weight.

`ops.reference.unpack_int4` defines how weights and scales lie in memory; checkpoints that hold such weights keep their
scales, of another group or dtype, to the last bit. As with int8, only the decoder's linear layers and the output layer
are quantized.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GROUP", "pack_int4", "packed_columns", "to_int4"]

GROUP = 64
"""Inputs that share a scale where trimserve quantizes: a scale of 16 bits is a quarter of a bit for each weight."""

_UNIT, _HALF = 32, 16
_LEAST, _MOST = -8, 7


def packed_columns(columns: int) -> int:
    """Bytes of one output's weights."""
    return -(-columns // _UNIT) * _HALF


def pack_int4(weights: Tensor) -> Tensor:
    """Pack weights, integers [R, columns] in [-8, 7], as `ops.linear` reads them: uint8 [R, packed_columns]."""
    codes = F.pad(weights.to(torch.uint8) + 8 & 15, (0, -weights.shape[1] % _UNIT), value=8)
    low, high = codes.view(len(codes), -1, 2, _HALF).unbind(2)
    return (low | high << 4).flatten(1)


def to_int4(rows: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantize weights, [R, columns] of any float dtype.

    The weight of the largest magnitude in a group becomes -8, by a scale of its sign.

    Args:
        rows: the weights.
        group: 32, 64 or 128 inputs.
    Returns:
        uint8 [R, packed_columns] and bfloat16 scales [R, groups]. Weights that are not finite give scales that are not.
    """
    groups = F.pad(rows.float(), (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scales = (torch.where(-low > high, low, high) / _LEAST).to(torch.bfloat16)
    divisors = scales.float().masked_fill(scales == 0, 1)[..., None]
    weights = (groups / divisors).round().clamp(_LEAST, _MOST).flatten(1)[:, : rows.shape[1]]
    return pack_int4(weights.to(torch.int8)), scales
