"""The text decoder in plain differentiable operations, for training what stands before it.

The compiled operators have no gradients, so training takes the same weights through torch's own operators; the test
holds both against each other. Prompts are padded to the longest, and nothing is stored. Weights get no gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.errors import CheckpointError
from trimserve.model.quantization import is_quantized
from trimserve.model.rotary import RotaryAngles, Rotation
from trimserve.model.transformers_mllama import (
    CrossLayerParts,
    MllamaForConditionalGeneration,
    NormParts,
    SelfLayerParts,
    decoder_parts,
)

__all__ = ["DifferentiableDecoder", "PaddedBatch"]

Watch = Callable[[int, Tensor], None]
"""Gets the number of a cross-attention layer and the rows [B, T, D] behind its attention, before its MLP."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Texts of B sequences, each about its own images; padding is behind."""

    token_ids: Tensor
    """int64 [B, T]"""
    sees: Tensor
    """bool [B, T], which rows see the sequence's images; no padding row does."""
    rows: Tensor
    """[B, M, D], what stands for the images, in the model's dtype."""
    bias: Tensor
    """float32 [B, M], added to every logit of a row; -inf at padding."""


class DifferentiableDecoder:
    """The decoder of one model that nobody shares and that is not quantized."""

    def __init__(self, model: MllamaForConditionalGeneration, head_dim: int) -> None:
        """Borrow the weights.

        Args:
            model: that `weights.load_weights` has built.
            head_dim: Dh.
        Raises:
            CheckpointError: the weights are quantized.
        """
        parts = decoder_parts(model)
        if is_quantized(parts.lm_head.weight):
            raise CheckpointError("training needs weights that are not quantized; take quantize none, or another model")
        self._parts = parts
        self._angles = RotaryAngles(parts.rotary)
        self._head_dim = head_dim
        self.num_cross_layers = sum(isinstance(layer, CrossLayerParts) for layer in parts.layers)
        """Cross-attention layers."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, int64 [...] -> [..., D]."""
        rows: Tensor = F.embedding(token_ids, self._parts.embed_tokens.weight)
        return rows

    def __call__(
        self, batch: PaddedBatch, wanted: Tensor, *, left_after: int | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Logits of some rows.

        Args:
            batch: what is read; gradients flow to its `rows`.
            wanted: bool [B, T], whose logits.
            left_after: cross-attention layer after which the others are left out; None leaves none out.
            watch: is shown each cross-attention layer that runs.
        Returns:
            float32 [wanted rows, V].
        """
        hidden = self.embed(batch.token_ids)
        rotation = self._angles.at([*range(batch.token_ids.shape[1])])
        num_cross = 0
        for layer in self._parts.layers:
            if isinstance(layer, SelfLayerParts):
                hidden = self._read_text(layer, hidden, rotation)
            else:
                if left_after is None or num_cross <= left_after:
                    hidden = self._read_images(layer, num_cross, hidden, batch, watch)
                num_cross += 1
        last = _norm(self._parts.norm, hidden[wanted])
        return _linear(last, self._parts.lm_head).float()

    def _read_text(self, layer: SelfLayerParts, hidden: Tensor, rotation: Rotation) -> Tensor:
        normal = _norm(layer.input_norm, hidden)
        q, k, v = (self._heads(_linear(normal, linear)) for linear in layer.qkv)
        q, k = (_rotated(heads, rotation) for heads in (q, k))
        looked = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = hidden + _linear(_joined(looked), layer.output)
        return hidden + _mlp(hidden, layer.mlp_norm, layer.gate_up, layer.down)

    def _read_images(
        self, layer: CrossLayerParts, index: int, hidden: Tensor, batch: PaddedBatch, watch: Watch | None
    ) -> Tensor:
        q = _norm(layer.q_norm, self._heads(_linear(_norm(layer.input_norm, hidden), layer.query)))
        k, v = (self._heads(_linear(batch.rows, linear)) for linear in layer.kv)
        bias = batch.bias[:, None, None].to(q.dtype)
        looked = F.scaled_dot_product_attention(q, _norm(layer.k_norm, k), v, attn_mask=bias, enable_gqa=True)
        seen = hidden + layer.attention_gate.tanh() * _linear(_joined(looked), layer.output)
        if watch is not None:
            watch(index, seen)
        seen = seen + layer.mlp_gate.tanh() * _mlp(seen, layer.mlp_norm, layer.gate_up, layer.down)
        return torch.where(batch.sees[..., None], seen, hidden)

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, T, heads * Dh] -> [B, heads, T, Dh]."""
        heads: Tensor = rows.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
        return heads


def _joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _linear(rows: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(rows, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _norm(norm: NormParts, rows: Tensor) -> Tensor:
    x = rows.float()
    normal: Tensor = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.epsilon)
    return normal.to(rows.dtype) * norm.weight.detach()


def _mlp(hidden: Tensor, norm: NormParts, gate_up: Sequence[nn.Linear], down: nn.Linear) -> Tensor:
    normal = _norm(norm, hidden)
    gate, up = (_linear(normal, linear) for linear in gate_up)
    return _linear(F.silu(gate) * up, down)


def _rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """[B, heads, T, Dh] at positions 0 to T - 1."""
    left, right = heads.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(heads.dtype)
