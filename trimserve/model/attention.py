"""Attention of whole prompts and images: our op on a CPU, torch's kernels on other devices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimserve import ops

__all__ = ["Run", "attention", "causal_attention"]

_ON_GPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's, which torch would try first on the newest GPUs: it makes a plan for every new shape, and every
prompt has its own."""


class Run(NamedTuple):
    """Consecutive rows that see the same keys, a half-open range."""

    num_rows: int
    first: int
    end: int


def attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attend with all rows at once, [T, H, Dh] over [L, Hkv, Dh].

    Args:
        q: queries.
        k: keys; Hkv divides H.
        v: values.
        runs: of all T rows, in order.
        scale: factor of the logits.
        bias: float32 [L], added to every row's logits.
    Returns:
        [T, H * Dh], and `ops.attention`'s log_sums, float32 [H, T], which only a CPU gives.
    """
    if q.device.type == "cpu":
        ranges = np.repeat([run[1:] for run in runs], [run.num_rows for run in runs], axis=0).astype(np.int32)
        attended, log_sums = ops.attention(q, k, v, torch.from_numpy(ranges.reshape(-1, 2)), scale, bias)
        return attended.flatten(1), log_sums
    pieces = [
        _torch_attention(rows, k[first:end], v[first:end], scale, bias=None if bias is None else bias[first:end])
        for rows, (_, first, end) in zip(q.split([run.num_rows for run in runs]), runs, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend with the last rows of a text to positions up to their own, [T, H, Dh] over [L, Hkv, Dh] -> [T, H * Dh].

    Args:
        q: queries, of the last T of L positions; on other devices than a CPU of all.
        k: keys; Hkv divides H.
        v: values.
        scale: factor of the logits.
    """
    if q.device.type == "cpu":
        ends = torch.arange(len(k) - len(q) + 1, len(k) + 1, dtype=torch.int32, device=q.device)
        return ops.attention(q, k, v, torch.stack([torch.zeros_like(ends), ends], dim=1), scale)[0].flatten(1)
    assert len(q) == len(k), "elsewhere rows are not cut into pieces"
    return _torch_attention(q, k, v, scale, is_causal=len(q) > 1)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Every row sees all keys, or those up to its own: [T, H, Dh] over [L, Hkv, Dh] -> [T, H * Dh]."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and (bias is not None or q.dtype == torch.float32):
        # Of the kernels that keep no logits of all pairs, only flash attention shares keys between heads.
        k, v = (rows[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for rows in (k, v))
    queries, keys, values = (rows.transpose(0, 1)[None] for rows in (q, k, v))
    with _kernels_for(q):
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if bias is None else bias.to(q.dtype).expand(1, 1, len(q), -1),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return attended[0].transpose(0, 1).flatten(1)


@contextmanager
def _kernels_for(rows: Tensor) -> Iterator[None]:
    if rows.is_cuda:
        with sdpa_kernel(_ON_GPU):
            yield
    else:
        yield
