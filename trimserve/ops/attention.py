"""Attention of many rows at once, those of a prompt or an image.

A typed wrapper over the compiled op of `csrc/attention.cpp`, with its fake kernel (shapes only, for torch.compile). All
checks are made in C++. `reference.py` defines what it computes. It knows no pages (`paging.py`).
"""

import torch
from torch import Tensor

from trimserve.ops.library import load_library

__all__ = ["attention"]

load_library()


def attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with every row to a range of keys. For CPU tensors.

    A row's result does not depend on the other rows or on the number of threads, to the last bit. bfloat16 weights are
    rounded to bfloat16 before they multiply values, where the machine multiplies pairs of it. NaN or infinity in v may
    spoil rows that do not see it. Strided rows are read in place.

    Args:
        q: float32, bfloat16 or float16 [T, H, Dh], queries; T may be 0.
        k: same dtype [N, Hkv, Dh], keys; Hkv divides H, query head h reads KV head h // (H / Hkv).
        v: as k, values.
        visibility: int32 [T, 2], row t sees positions [visibility[t, 0], visibility[t, 1]), which may be empty.
        scale: factor of the logits, finite.
        bias: float32 [N], added to the logits of every row and head; None if there is no bias.
    Returns:
        attended: [T, H, Dh] of q's dtype, accumulated in float32; zeros where a row sees nothing.
        log_sums: float32 [H, T], the logarithm of the sum of the exponentials of a row's logits; -inf where it sees
            nothing.
    Raises:
        ValueError: a wrong dtype or shape, a range outside [0, N], or a scale that is not finite.
    Source: online softmax, arXiv 1805.02867; blocks, arXiv 2205.14135. Definition: reference.attention.
    """
    result: tuple[Tensor, Tensor] = torch.ops.trimserve.attention(q, k, v, visibility, scale, bias)
    return result


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


torch.library.register_fake("trimserve::attention", _fake_attention)
