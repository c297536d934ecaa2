"""Attention of whole prompts and images: torch's, by the kernels that suit any shape."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attention"]

_ON_GPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's, which torch would try first on the newest GPUs: it makes a plan for every new shape, and every
prompt has its own."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Attend with all rows at once, [H, T, Dh] over [Hkv, L, Dh] -> [T, H * Dh].

    Args:
        q: queries.
        k: keys; Hkv divides H.
        v: values.
        scale: factor of the logits.
        is_causal: row t attends up to position t.
        bias: [L], added to every row's logits.
    """
    has_groups = q.shape[0] != k.shape[0]
    if has_groups and q.is_cuda and (bias is not None or q.dtype == torch.float32):
        # Of the kernels that keep no logits of all pairs, only flash attention shares keys between heads.
        group = q.shape[0] // k.shape[0]
        k, v = (rows[:, None].expand(-1, group, -1, -1).flatten(0, 1) for rows in (k, v))
        has_groups = False
    with _kernels_for(q):
        attended = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if bias is None else bias.expand(1, 1, q.shape[1], -1),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=has_groups,
        )
    return attended[0].transpose(0, 1).flatten(1)


@contextmanager
def _kernels_for(rows: Tensor) -> Iterator[None]:
    if rows.is_cuda:
        with sdpa_kernel(_ON_GPU):
            yield
    else:
        yield
