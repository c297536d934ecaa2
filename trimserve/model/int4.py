"""Weight-only int4: groups of 64 inputs of each output share a scale, half a byte for each weight.

`ops.reference.unpack_int4` defines how weights and scales lie in memory; checkpoints that hold such weights keep their
scales, of another group or dtype, to the last bit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GROUP", "UNIT", "pack_int4", "packed_columns", "to_int4", "unpack_int4"]

GROUP = 64
"""Inputs that share a scale where trimserve quantizes: a scale of 16 bits is a quarter of a bit for each weight."""

UNIT = 32
"""Inputs whose weights lie together; the last of a row are filled up."""

_GROUPS = (32, 64, 128)
_HALF = UNIT // 2
_LEAST, _MOST = -8, 7


def packed_columns(columns: int) -> int:
    """Bytes of one output's weights."""
    return -(-columns // UNIT) * _HALF


def pack_int4(weights: Tensor) -> Tensor:
    """Pack weights, integers [R, columns] in [-8, 7], as `ops.linear` reads them: uint8 [R, packed_columns]."""
    codes = F.pad(weights.to(torch.uint8) + 8 & 15, (0, -weights.shape[1] % UNIT), value=8)
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


def unpack_int4(weight: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weights [R, columns] that `pack_int4` packed, times their scales; float32, which holds them exactly.

    Args:
        weight: uint8 [R, packed_columns].
        scales: float32, bfloat16 or float16 [R, groups].
        columns: inputs.
    """
    units = weight.unflatten(1, (-1, _HALF))
    integers = torch.stack([units & 15, units >> 4], dim=2).flatten(1)[:, :columns].float().add_(_LEAST)
    group = next(size for size in _GROUPS if -(-columns // size) == scales.shape[1])
    padded = F.pad(integers, (0, -columns % group)).unflatten(1, (-1, group))
    product: Tensor = padded.mul_(scales.float()[..., None])
    return product.flatten(1)[:, :columns]
