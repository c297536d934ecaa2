"""The peer: transformers' own Mllama with Meta's semantics (`training.mended`), and the same trimmed in plain PyTorch.

`trimmed_logits` feeds the peer's own modules: features chosen and merged by a literal reading of the rules go into its
later cross-attention layers. Nothing here calls trimserve.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from training.mended import mend

__all__ = ["UNSEEN", "Attend", "Peer", "literal_groups"]

UNSEEN: Final = torch.finfo(torch.float32).min
"""Bias of what a row does not see."""

Attend = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""From a cross-attention layer and its rows [1, T, D] to features [1, M, D] and biases [T, M]."""


class Peer:
    """A checkpoint as transformers runs it."""

    def __init__(self, folder: Path, *, mended: bool = True, **mends: bool) -> None:
        """Load it; `mends` are those of `training.mended.mend`."""
        self.model: Any = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        if mended:
            mend(self.model, **mends)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.images: Any = MllamaImageProcessorPil.from_pretrained(folder)

    def inputs(self, token_ids: list[int], images: list[Image.Image]) -> dict[str, Tensor]:
        """What the processor makes of token ids and images."""
        inputs = {"input_ids": torch.tensor([token_ids]), "attention_mask": torch.ones(1, len(token_ids))}
        if images:
            pixels = self.images(images=[images], return_tensors="pt")
            num_tiles = pixels.pop("num_tiles")
            locations = get_cross_attention_token_mask(token_ids, self.model.config.image_token_index)
            max_tiles = self.model.config.vision_config.max_num_tiles
            mask = convert_sparse_cross_attention_mask_to_dense([locations], num_tiles, max_tiles, len(token_ids))
            inputs |= {**pixels, "cross_attention_mask": torch.from_numpy(mask)}
        return inputs

    @torch.inference_mode()
    def logits(self, token_ids: list[int], images: list[Image.Image]) -> Tensor:
        """Logits [T, vocab_size] of every row."""
        logits: Tensor = self.model(**self.inputs(token_ids, images)).logits[0]
        return logits

    @torch.inference_mode()
    def generate(self, token_ids: list[int], images: list[Image.Image], max_new_tokens: int) -> list[int]:
        """Greedy continuation."""
        inputs = self.inputs(token_ids, images)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        continuation: list[int] = output[0, len(token_ids) :].tolist()
        return continuation

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Visual features [1, N, D] of all tiles, padding included."""
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        vision = self.model.model.vision_model(*(inputs[name] for name in names)).last_hidden_state
        features: Tensor = self.model.model.multi_modal_projector(vision)
        return features.reshape(1, -1, features.shape[-1])

    def read(self, inputs: dict[str, Tensor], attend: Attend) -> Tensor:
        """Logits [T, vocab_size] of every row, where `attend` says what each cross-attention layer sees."""
        text, config = self.model.model.language_model, self.model.config.text_config
        hidden = text.embed_tokens(inputs["input_ids"])
        rotary = text.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        causal = torch.full((hidden.shape[1],) * 2, UNSEEN).triu(1)[None, None]
        for index, layer in enumerate(text.layers):
            if index not in config.cross_attention_layers:
                hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
                continue
            features, bias = attend(layer, hidden)
            rows = (bias > UNSEEN).any(dim=1)[None, None, :, None].float()
            hidden = layer(
                hidden,
                cross_attention_states=features,
                cross_attention_mask=bias[None, None] * rows,
                attention_mask=causal,
                full_text_row_masked_out_mask=rows,
            )
        logits: Tensor = self.model.lm_head(text.norm(hidden))[0]
        return logits

    @torch.inference_mode()
    def trimmed_logits(
        self,
        token_ids: list[int],
        images: list[Image.Image],
        k_ratio: float,
        merge_ratio: float = 0.0,
        num_prompt: int | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Logits [T, vocab_size] and the kept features when later cross-attention layers see a selection only.

        Rows from `num_prompt` on are decoded ones: they do not take part in the selection and see only what is kept
        and merged, in the first cross-attention layer too.
        """
        num_read = num_prompt or len(token_ids)
        inputs = self.inputs(token_ids, images)
        features, tiles = self.features(inputs), inputs["aspect_ratio_mask"][0]
        num_features, patches = features.shape[1], features.shape[1] // tiles.numel()
        # [T, N] over all features, padding tiles included; decoded rows see what the last prompt row sees
        mask = inputs["cross_attention_mask"][0].flatten(1).repeat_interleave(patches, dim=1).bool()
        mask[num_read:] = mask[num_read - 1]
        valid = (tiles[:, :, None].expand(-1, -1, patches) == 1).flatten(1)
        kept = held = weight = torch.empty(0)
        hooks: list[Any] = []

        def attend(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
            """The first layer sees all and selects, the others see what is held."""
            nonlocal features, mask, kept, held, weight
            if hooks:
                return features[:, held], weight[held].masked_fill(~mask[:, held], UNSEEN)
            attention = layer.cross_attn
            kept = self._select(attention, layer.input_layernorm(hidden), features, mask[:num_read], valid, k_ratio)
            groups = self._merge(attention, features, kept, valid, patches, merge_ratio)
            # Merged rows follow the features, as columns that are seen where their members are.
            features = _with_means(features, groups, dim=1)
            mask = torch.cat([mask, mask[:, [members[0] for members in groups]]], dim=1)
            weight = torch.tensor([0.0] * num_features + [math.log(len(members)) for members in groups])
            held = torch.cat([kept, torch.arange(num_features, len(weight))])
            # Values are linear in the features, keys are normed: those of merged rows are averaged here.
            hooks.append(attention.k_norm.register_forward_hook(partial(_average_keys, groups, num_features)))
            is_held = torch.zeros(len(weight), dtype=torch.bool).index_fill(0, held, True)
            is_decoded = torch.arange(len(mask))[:, None] >= num_read
            seen = mask & torch.where(is_decoded, is_held, torch.arange(len(weight)) < num_features)
            return features, weight.masked_fill(~seen, UNSEEN)

        logits = self.read(inputs, attend)
        hooks[0].remove()
        # Numbered as trimserve numbers them: valid features of all images one after another.
        number = torch.cumsum(valid.flatten(), dim=0) - 1
        return logits, number[kept].tolist()

    def _merge(
        self, attention: Any, features: Tensor, kept: Tensor, valid: Tensor, patches: int, merge_ratio: float
    ) -> list[list[int]]:
        """The dropped features of every tile, grouped."""
        keys = attention.k_norm(attention.k_proj(features[0]).view(features.shape[1], -1, attention.head_dim))
        groups = []
        for start in range(0, valid.numel(), patches):
            if merge_ratio and valid.flatten()[start]:
                dropped = sorted({*range(start, start + patches)} - {*kept.tolist()})
                groups += literal_groups(keys.flatten(1), dropped, max(1, math.ceil(merge_ratio * patches - 1e-9)))
        return groups

    def _select(
        self,
        attention: Any,
        hidden: Tensor,
        features: Tensor,
        mask: Tensor,
        valid: Tensor,
        k_ratio: float,
    ) -> Tensor:
        num_heads, head_dim = attention.num_heads, attention.head_dim
        q = attention.q_norm(attention.q_proj(hidden[0]).view(-1, num_heads, head_dim))[: len(mask)]
        k = attention.k_norm(attention.k_proj(features[0]).view(features.shape[1], -1, head_dim))
        kept = set()
        for head in range(num_heads):
            kv_head = head // attention.num_key_value_groups
            weights = (q[:, head] @ k[:, kv_head].T / head_dim**0.5).masked_fill(~mask, -math.inf).softmax(-1)
            start = 0
            for image in valid:
                columns = [start + n for n in range(len(image)) if image[n]]
                rows = mask[:, columns[0]]
                scores = weights[rows][:, columns].mean(dim=0).tolist()
                k_image = min(max(math.ceil(k_ratio * len(columns) - 1e-9), 1), len(columns))
                ranked = sorted(range(len(columns)), key=lambda n: (-scores[n], n))
                kept |= {columns[n] for n in ranked[:k_image]}
                start += len(image)
        return torch.tensor(sorted(kept))


def literal_groups(keys: Tensor, dropped: list[int], most: int) -> list[list[int]]:
    """Group some rows of keys [N, D] around anchors that are far apart."""
    if not dropped:
        return []
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    likeness = (unit @ unit.T).tolist()
    to_mean = (unit @ unit[dropped].mean(dim=0)).tolist()
    anchors = [min(dropped, key=to_mean.__getitem__)]
    while len(anchors) < min(most, len(dropped)):
        others = (n for n in dropped if n not in anchors)
        anchors.append(min(others, key=lambda n: max(likeness[n][anchor] for anchor in anchors)))
    groups: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for n in dropped:
        groups[n if n in groups else max(anchors, key=likeness[n].__getitem__)].append(n)
    return list(groups.values())


def _average_keys(groups: list[list[int]], num_features: int, _module: Any, _args: Any, keys: Tensor) -> Tensor:
    return _with_means(keys[:, :, :num_features], groups, dim=2)


def _with_means(rows: Tensor, groups: list[list[int]], dim: int) -> Tensor:
    """The rows along a dimension, and behind them the mean of each group."""
    means = [rows.index_select(dim, torch.tensor(members)).mean(dim=dim, keepdim=True) for members in groups]
    return torch.cat([rows, *means], dim=dim)
