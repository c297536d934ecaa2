"""Ops on rows between attentions, for the few rows of a decode step, where calls cost as much as arithmetic.

Typed wrappers over the compiled ops of `csrc/layers.cpp`, each with its fake kernel (shapes only, for torch.compile).
All checks are made in C++. On CUDA `decode_layers` is not there and the others are torch's own ops, which check what
they like. `reference.py` defines what each op computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.ops.library import load_library

__all__ = ["decode_layers", "linear", "rms_norm", "rotate", "silu_gate"]

load_library()


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """Multiply rows with a weight.

    A row's result does not depend on the other rows or on the number of threads, to the last bit. Strided rows are
    read in place.

    Args:
        x: float32, bfloat16 or float16 [R, K].
        weight: same dtype [N, K], contiguous; int8 with scales.
        scales: float32 [N], factors of the weight's rows; None: there are none.
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


def silu_gate(gate_up: Tensor) -> Tensor:
    """What the gate of an MLP lets through: gate * sigmoid(gate) * up.

    Args:
        gate_up: float32, bfloat16 or float16 [R, 2 * I], of each row first the gates.
    Returns:
        [R, I] of the same dtype, computed in float32; on CUDA gate * sigmoid(gate) is rounded before the product.
    Raises:
        ValueError: a wrong dtype or shape.
    Source: SwiGLU, arXiv:2002.05202. Definition: reference.silu_gate.
    """
    result: Tensor = torch.ops.trimserve.silu_gate(gate_up)
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


def decode_layers(
    hidden: Tensor,
    pages: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    cross_layers: Sequence[int],
    gates: Sequence[float],
    cosines: Tensor,
    sines: Tensor,
    text_tables: Tensor,
    text_lengths: Tensor,
    slots: Tensor,
    feature_tables: Sequence[Tensor],
    feature_lengths: Sequence[Tensor],
    biases: Sequence[Tensor],
    epsilon: float,
) -> None:
    """One new row of each sequence through all layers of a decoder, in one call; CPU only.

    The first rows see features, the others pass a cross-attention layer unchanged; other threads of Python run. Tensors
    have the dtypes and shapes that `paged_attention` and the ops above take.

    Args:
        hidden: [B, D], contiguous; becomes the last layer's output.
        pages: [P, G, 2, Hkv, PAGE_POSITIONS, Dh]; written to.
        weights: layer after layer. Self-attention: input norm, query-key-value, output, MLP norm, gate-up, down.
            Cross-attention: input norm, query, query norm, output, MLP norm, gate-up, down.
        scales: of the linear layers' weights, layer after layer, which are int8 then; empty where they are not.
        cross_layers: which layers are cross-attention.
        gates: factors of each cross-attention layer's attention and MLP.
        cosines: float32 [B, Dh / 2], of the rows' positions.
        sines: as cosines.
        text_tables: int32 [groups, B, max_pages].
        text_lengths: int32 [B], the new row among them.
        slots: int64 [groups, B], where the new rows' keys and values go.
        feature_tables: of each cross-attention layer int32 [S, max_pages], of its first S rows; empty: no row sees any.
        feature_lengths: of each int32 [S]; empty with `feature_tables`.
        biases: of each float32 [S, max_pages * PAGE_POSITIONS], added to the logits of features; empty: nothing is.
        epsilon: of all norms.
    Raises:
        ValueError: what any of the ops would refuse, or numbers of weights and gates that do not fit.
    Definition: the same ops one by one, `models.decoder.RaggedDecoder.decode`.
    """
    torch.ops.trimserve.decode_layers(
        hidden,
        pages,
        weights,
        scales,
        cross_layers,
        gates,
        cosines,
        sines,
        text_tables,
        text_lengths,
        slots,
        feature_tables,
        feature_lengths,
        biases,
        epsilon,
    )


def _fake_linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_silu_gate(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    return None


def _linear_of_torch(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    if scales is None:
        return F.linear(x, weight)
    return (F.linear(x.float(), weight.float()) * scales).to(x.dtype)


def _rms_norm_of_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _silu_gate_of_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate_of_torch(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    left, right = heads.float().chunk(2, dim=-1)
    cos, sin = cosines[:, None], sines[:, None]
    heads.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))


torch.library.impl("trimserve::linear", "CUDA", _linear_of_torch)
torch.library.impl("trimserve::rms_norm", "CUDA", _rms_norm_of_torch)
torch.library.impl("trimserve::silu_gate", "CUDA", _silu_gate_of_torch)
torch.library.impl("trimserve::rotate", "CUDA", _rotate_of_torch)
torch.library.register_fake("trimserve::linear", _fake_linear)
torch.library.register_fake("trimserve::rms_norm", _fake_rms_norm)
torch.library.register_fake("trimserve::silu_gate", _fake_silu_gate)
torch.library.register_fake("trimserve::rotate", _fake_rotate)
