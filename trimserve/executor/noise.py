"""Gumbel noise that is a function of seed, position and token id, never of batch, device or torch version.

argmax(scores + noise) draws from softmax(scores). Token i gets `-log(-log(u))`, where u in (0, 1) is made of the
upper 52 bits of `mix(mix(mix(seed) + position) + i * GOLDEN)`, the steps of splitmix64. Integers alone make these
bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["NOISE_RANGE", "gumbel_noise", "noise_keys"]

NOISE_RANGE = 41.0
"""No two draws are further apart: u has 52 bits, so noise lies between -3.61 and 36.74."""


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """What the noise of each row starts from.

    Args:
        seeds: B seeds, unsigned 64 bits.
        positions: B counts of tokens generated before this one.
    Returns:
        int64 [B], on the CPU.
    """
    mixed = _mix(torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)))
    return _mix(mixed + torch.from_numpy(np.array(positions, dtype=np.int64)))


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of tokens.

    Args:
        keys: int64, of each token's row.
        token_ids: int64, of a shape that goes with that of `keys`.
    Returns:
        float64, of the shape that both broadcast to.
    """
    bits = _mix(token_ids * _GOLDEN + keys)
    uniform = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)  # never 0 or 1
    return uniform.log_().neg_().log_().neg_()


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # torch has no unsigned shift: the sign bits that come in from the left are cleared.
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    # In place: over a vocabulary, fresh memory costs more than arithmetic.
    bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 31))
