"""Ops of a layer outside attention, for the few rows of a decode step, where a call costs as much as its arithmetic.

Typed wrappers over the compiled ops of `csrc/layers.cpp`, each with its fake kernel (shapes only, for torch.compile).
All checks are made in C++. On CUDA `linear` and `rms_norm` are torch's own, with torch's checks. `reference.py` defines
what each op computes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.ops.library import load_library

__all__ = ["linear", "rms_norm", "rotate", "silu_gate"]

load_library()


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """Multiply rows with a weight.

    A row's result does not depend on the other rows or on the number of threads, to the last bit, among calls of up to
    48 rows and among those of more; with int8 or int4 weights of up to 15. Of bfloat16 rows and weights the number does
    not matter where the machine has no products of bfloat16 pairs. Strided rows are read in place.

    Args:
        x: float32, bfloat16 or float16 [R, K].
        weight: same dtype [N, K], or int8 [N, K], or int4 as uint8 [N, 16 * ceil(K / 32)], which
            `reference.unpack_int4` defines; contiguous.
        scales: of an int8 weight float32 [N], factors of its rows; of int4 float32, bfloat16 or float16
            [N, ceil(K / group)] for groups of 32, 64 or 128 inputs; else None.
    Returns:
        [R, N] of the same dtype, accumulated in float32.
    Raises:
        ValueError: a wrong dtype or shape, or a weight that is not contiguous.
    Definition: reference.linear.
    """
    result: Tensor = torch.ops.trimserve.linear(x, weight, scales)
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


def silu_gate(gate_up: Tensor, counts: Tensor | None = None) -> Tensor:
    """Apply the gated activation of an MLP: gate * sigmoid(gate) * up.

    Args:
        gate_up: float32, bfloat16 or float16 [R, 2 * I], in each row I gates and then I ups.
        counts: int32 [R]; rows with 0 become 0, whatever they hold. None for none.
    Returns:
        [R, I] of the same dtype, computed in float32.
    Raises:
        ValueError: a wrong dtype or shape.
    Source: SwiGLU, arXiv:2002.05202. Definition: reference.silu_gate.
    """
    result: Tensor = torch.ops.trimserve.silu_gate(gate_up, counts)
    return result


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Apply rotary position embedding in place: rotate elements d and d + Dh / 2 of a head by angle d of its row.

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


def _fake_linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_silu_gate(gate_up: Tensor, counts: Tensor | None = None) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    return None


def _linear_of_torch(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    if scales is None:
        return F.linear(x, weight)
    if weight.dtype == torch.uint8:
        raise ValueError("linear: int4 weights are for the CPU")
    return (F.linear(x.float(), weight.float()) * scales).to(x.dtype)


def _rms_norm_of_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


torch.library.impl("trimserve::linear", "CUDA", _linear_of_torch)
torch.library.impl("trimserve::rms_norm", "CUDA", _rms_norm_of_torch)
torch.library.register_fake("trimserve::linear", _fake_linear)
torch.library.register_fake("trimserve::rms_norm", _fake_rms_norm)
torch.library.register_fake("trimserve::silu_gate", _fake_silu_gate)
torch.library.register_fake("trimserve::rotate", _fake_rotate)
