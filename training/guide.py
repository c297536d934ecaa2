"""What teaches a guide, a model of half the width, to look where the whole one looks; the loop is `train.py`'s."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration

from training.attention import WRITTEN_OUT
from training.batches import Batch
from training.mended import mend
from training.model import read_batch

__all__ = ["Teacher"]

_HIDDEN = -1e9
"""Score of a feature that a row does not see."""


class Teacher:
    """A frozen model: a guide learns its answers, and where every head of its first cross-attention layer looks."""

    def __init__(self, checkpoint: Path, guide: MllamaForConditionalGeneration) -> None:
        """Load the model, and give the guide every second channel of every weight; heads and rotary frequencies fit.

        Args:
            checkpoint: folder of an exported model.
            guide: of half the width, and of as many layers and heads.
        """
        self._model = mend(MllamaForConditionalGeneration.from_pretrained(checkpoint).float()).eval()
        nn.Module.to(self._model, guide.device)
        self._model.set_attn_implementation(WRITTEN_OUT)
        _take_every_second(self._model, guide)
        self._own_look, self._look = _Look(self._model), _Look(guide)

    def losses(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How far the guide is from this model on the batch that it read last, in nats.

        Args:
            batch: what was read.
            logits: [L, V] of the guide, for each label.
        Returns:
            KL(model || guide) of the answers' tokens, mean over labels, and of the attention weights, mean over heads
            and rows that see an image.
        """
        with torch.no_grad():
            own_logits, _ = read_batch(self._model, batch)
            own_weights = self._own_look.log_weights(batch)
        answers = _divergence(own_logits.float().log_softmax(-1), logits.float().log_softmax(-1))
        return answers, _divergence(own_weights, self._look.log_weights(batch))


class _Look:
    """Queries and keys of a model's first cross-attention layer, as of the last batch."""

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        text = model.model.language_model
        attention = text.layers[text.config.cross_attention_layers[0]].cross_attn
        self._scaling = attention.scaling
        self._queries = self._keys = torch.empty(0)
        attention.q_norm.register_forward_hook(self._take_queries)
        attention.k_norm.register_forward_hook(self._take_keys)

    def log_weights(self, batch: Batch) -> Tensor:
        """Logarithms of the attention weights of the rows that see an image, float32 [rows, H, N]."""
        queries, keys = self._queries.float() * self._scaling, self._keys.float()
        grouped = queries.reshape(*keys.shape[:2], -1, keys.shape[3])  # query heads beside their key head
        scores = (grouped @ keys.transpose(2, 3)).view(*queries.shape[:3], -1).transpose(1, 2)  # [B, T, H, N]
        seen = batch.cross_attention_mask.flatten(2).bool()  # [B, T, tiles]
        rows = seen.any(dim=2)
        features = seen[rows].repeat_interleave(keys.shape[2] // seen.shape[2], dim=1)[:, None]
        weights: Tensor = scores[rows].masked_fill(~features, _HIDDEN).log_softmax(-1)
        return weights

    def _take_queries(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._queries = output

    def _take_keys(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._keys = output


@torch.no_grad()
def _take_every_second(whole: nn.Module, half: nn.Module) -> None:
    """Give a model the weights of one that is wider: in every dimension those at even places."""
    weights = whole.state_dict()
    for name, weight in half.state_dict().items():
        steps = (full // size for full, size in zip(weights[name].shape, weight.shape, strict=True))
        weight.copy_(weights[name][tuple(slice(None, None, step) for step in steps)])


def _divergence(of: Tensor, beside: Tensor) -> Tensor:
    """KL of log probabilities along the last dimension, mean over the others."""
    return (of.exp() * (of - beside)).sum(-1).mean()
