"""Small numbers packed into int32, and groups of inputs that share a scale; what several formats have in common."""

import torch
from torch import Tensor

__all__ = ["INT4_GROUPS", "INT4_ZERO", "scaled", "unpack"]

INT4_GROUPS = (32, 64, 128)
"""Inputs that share a scale, where numbers of 4 bits are multiplied as they are stored."""

INT4_ZERO = 8
"""What numbers of 4 bits without zero points are raised by."""


def unpack(words: Tensor, num_bits: int) -> Tensor:
    """Numbers in the bits of words, lowest first.

    Args:
        words: int32 [R, W]
        num_bits: 4 or 8.
    Returns:
        int16 [R, W * 32 / num_bits], in [0, 2 ** num_bits).
    """
    # Little-endian, as every machine that torch has builds for. A view needs strides that `contiguous` does not ensure.
    numbers = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if num_bits == 4:
        numbers = torch.stack((numbers & 0xF, numbers >> 4), dim=-1).flatten(1)
    return numbers.to(torch.int16)


def scaled(numbers: Tensor, zero_points: Tensor, scales: Tensor, group: Tensor | None) -> Tensor:
    """Numbers less their zero points times their scales.

    Differences are exact in every float dtype, so they are taken of integers.

    Args:
        numbers: int16 [R, inputs]
        zero_points: int16 [R, groups], or a scalar.
        scales: floats [R, groups]
        group: int64 [inputs], the group of each; None if groups are runs of equal length.
    Returns:
        Of the scales' dtype, [R, inputs].
    """
    if group is not None:
        of_inputs = zero_points[:, group] if zero_points.ndim else zero_points
        return (numbers - of_inputs).to(scales.dtype).mul_(scales[:, group])
    runs = numbers.unflatten(1, (scales.shape[1], -1))
    of_runs = zero_points[:, :, None] if zero_points.ndim else zero_points
    product: Tensor = (runs - of_runs).to(scales.dtype).mul_(scales[:, :, None])
    return product.flatten(1)
