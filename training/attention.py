"""Attention for training on a CPU: written out image by image, so that an image's scores stay in the cache.

Small heads make torch's fused attention slow backwards, and the scores of a whole batch do not fit into any
cache. Products are in bfloat16, softmax and sums in float32. Registered with transformers as `written_out`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["WRITTEN_OUT", "register"]

WRITTEN_OUT = "written_out"


def register() -> None:
    """Make `set_attn_implementation(WRITTEN_OUT)` possible."""
    ALL_ATTENTION_FUNCTIONS.register(WRITTEN_OUT, _attend)


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend.

    Args:
        _module: the attention layer.
        query: [B, H, T, Dh].
        key: [B, Hkv, N, Dh].
        value: [B, Hkv, N, Dh].
        attention_mask: float [B, 1, T, N], added to the scores.
        scaling: of the scores.
    Returns:
        [B, T, H, Dh] in query's dtype, and no weights.
    """
    batch, heads, length, width = query.shape
    grouped = (query * scaling).reshape(batch, key.shape[1], -1, width)  # query heads beside their key head
    low = torch.bfloat16
    attend: Any = _Attention.apply  # untyped in torch
    output: Tensor = attend(grouped.to(low), key.to(low), value.to(low), attention_mask.float())
    return output.view(batch, heads, length, width).transpose(1, 2).to(query.dtype), None


class _Attention(torch.autograd.Function):
    """softmax(q k^T + mask) v of q [B, G, R, Dh], k and v [B, G, N, Dh], mask [B, 1, T, N]; R is a multiple of T."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        groups, rows, length = q.shape[1], q.shape[2], mask.shape[2]
        output = torch.empty_like(q)
        weights = q.new_empty((*q.shape[:3], k.shape[2]))
        for image in range(q.shape[0]):
            scores = torch.bmm(q[image], k[image].transpose(1, 2)).float()
            scores.view(groups, rows // length, length, -1).add_(mask[image])
            weights[image] = scores.softmax(-1)
            torch.bmm(weights[image], v[image], out=output[image])
        ctx.save_for_backward(q, k, v, weights)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for image in range(q.shape[0]):
            p = weights[image]
            torch.bmm(p.transpose(1, 2), grad[image], out=grad_v[image])
            grad_p = torch.bmm(grad[image], v[image].transpose(1, 2)).float()
            p32 = p.float()
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p32, -1, torch.float32).to(q.dtype)
            torch.bmm(grad_scores, k[image], out=grad_q[image])
            torch.bmm(grad_scores.transpose(1, 2), q[image], out=grad_k[image])
        return grad_q, grad_k, grad_v, None
