"""The peer: transformers' own Mllama with Meta's semantics (`training.mended`), and the same trimmed in plain PyTorch.

`trimmed_logits` feeds the peer's own modules: features chosen by a literal reading of the selection rule go into
its later cross-attention layers. Nothing here calls trimserve.
"""

import math
from pathlib import Path
from typing import Any

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

__all__ = ["Peer"]


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

    @torch.inference_mode()
    def trimmed_logits(
        self, token_ids: list[int], images: list[Image.Image], k_ratio: float, num_prompt: int | None = None
    ) -> tuple[Tensor, list[int]]:
        """Logits [T, vocab_size] and the kept features when later cross-attention layers see a selection only.

        Rows from `num_prompt` on are decoded ones: they do not take part in the selection and see only what is kept.
        """
        num_prompt = num_prompt or len(token_ids)
        inputs = self.inputs(token_ids, images)
        model, config = self.model.model, self.model.config.text_config
        vision = model.vision_model(
            inputs["pixel_values"], inputs["aspect_ratio_ids"], inputs["aspect_ratio_mask"]
        ).last_hidden_state
        features = model.multi_modal_projector(vision).reshape(1, -1, config.hidden_size)
        patches = vision.shape[-2]
        # [T, N] over all features, padding tiles included; decoded rows see what the last prompt row sees
        mask = inputs["cross_attention_mask"][0].flatten(1).repeat_interleave(patches, dim=1).bool()
        mask[num_prompt:] = mask[num_prompt - 1]
        valid = (inputs["aspect_ratio_mask"][0][:, :, None].expand(-1, -1, patches) == 1).flatten(1)

        text = model.language_model
        hidden = text.embed_tokens(inputs["input_ids"])
        positions = torch.arange(hidden.shape[1])[None]
        rotary = text.rotary_emb(hidden, positions)
        causal = torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        kept: Tensor | None = None
        for index, layer in enumerate(text.layers):
            if index not in config.cross_attention_layers:
                hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
                continue
            seen = mask
            if kept is None:
                normed = layer.input_layernorm(hidden)
                kept = self._select(layer.cross_attn, normed, features, mask[:num_prompt], valid, k_ratio)
                seen = mask.clone()
                seen[num_prompt:] &= torch.zeros(mask.shape[1], dtype=torch.bool).index_fill(0, kept, True)
                states = features
            else:
                seen, states = mask[:, kept], features[:, kept]
            rows = seen.any(dim=1)[None, None, :, None].float()
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None] * rows
            hidden = layer(
                hidden,
                cross_attention_states=states,
                cross_attention_mask=bias,
                attention_mask=causal,
                full_text_row_masked_out_mask=rows,
            )
        assert kept is not None
        # Numbered as trimserve numbers them: valid features of all images one after another.
        number = torch.cumsum(valid.flatten(), dim=0) - 1
        return self.model.lm_head(text.norm(hidden))[0], number[kept].tolist()

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
