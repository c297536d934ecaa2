"""Ops on rows between attentions, for the few rows of a decode step, where calls cost as much as arithmetic.

Typed wrappers over the compiled ops of `csrc/layers.cpp`, each with its fake kernel (shapes only, for torch.compile).
All checks are made in C++. On CUDA they are torch's own ops. `reference.py` defines what each op computes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.ops.library import load_library

__all__ = ["linear", "rms_norm", "rotate"]

load_library()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows with a weight.

    A row's result does not depend on the other rows or on the number of threads, to the last bit. Strided rows are
    read in place.

    Args:
        x: float32, bfloat16 or float16 [R, K].
        weight: same dtype [N, K], contiguous.
    Returns:
        [R, N] of the same dtype, accumulated in float32.
    Raises:
        ValueError: a wrong dtype or shape, or a weight that is not contiguous.
    Definition: reference.linear.
    """
    result: Tensor = torch.ops.trimserve.linear(x, weight)
    return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square along the last dimension and multiply with a weight.

    Args:
        x: float32, bfloat16 or float16 [R, K] or [R, H, K].
        weight: same dtype [K].
        epsilon: added to the mean square, finite and at least 0.
    Returns:
        As x, computed in float32.
    Raises:
        ValueError: a wrong dtype or shape, or an epsilon out of range.
    Source: Root Mean Square Layer Normalization, arXiv:1910.07467. Definition: reference.rms_norm.
    """
    result: Tensor = torch.ops.trimserve.rms_norm(x, weight, epsilon)
    return result


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Rotary position embedding, in place: elements d and d + Dh / 2 of a head are turned by angle d of its row.

    Args:
        heads: float32, bfloat16 or float16 [R, H, Dh], Dh even, contiguous within a row; written to.
        cosines: float32 [R, Dh / 2].
        sines: as cosines.
    Raises:
        ValueError: a wrong dtype or shape, or heads with gaps between them.
    Source: RoFormer, arXiv:2104.09864, in the order of dimensions that Llama has in transformers. Definition:
    reference.rotate.
    """
    torch.ops.trimserve.rotate(heads, cosines, sines)


def _fake_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    return None


def _rms_norm_of_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _rotate_of_torch(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    left, right = heads.float().chunk(2, dim=-1)
    cos, sin = cosines[:, None], sines[:, None]
    heads.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))


torch.library.impl("trimserve::linear", "CUDA", F.linear)
torch.library.impl("trimserve::rms_norm", "CUDA", _rms_norm_of_torch)
torch.library.impl("trimserve::rotate", "CUDA", _rotate_of_torch)
torch.library.register_fake("trimserve::linear", _fake_linear)
torch.library.register_fake("trimserve::rms_norm", _fake_rms_norm)
torch.library.register_fake("trimserve::rotate", _fake_rotate)
