"""A decode step of transformers' Mllama, called alike in every release from 5.17 on."""

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration

__all__ = ["CACHE", "cache_of", "growing_step"]

CACHE: Final = "cache" if "cache" in signature(MllamaForConditionalGeneration.forward).parameters else "past_key_values"
"""What the KV cache is called, as an argument and in outputs: `cache` from transformers 5.24 on."""


def cache_of(output: Any) -> Any:
    """The KV cache in what a forward pass or `generate` returns."""
    return getattr(output, CACHE)


def growing_step(model: Any, prompt: dict[str, Tensor], cache: Any, batch: int) -> Callable[[], Tensor]:
    """A decode step of several copies of one sequence; each call is one position longer.

    Args:
        model: `MllamaForConditionalGeneration`.
        prompt: `input_ids` [1, T] and `cross_attention_mask` [1, T, images, tiles].
        cache: of the prompt; a copy is taken.
        batch: B, copies of the sequence.
    Returns:
        Gives logits [B, 1, V].
    """
    grown = copy.deepcopy(cache)
    grown.batch_repeat_interleave(batch)
    length, device = prompt["input_ids"].shape[1], prompt["input_ids"].device
    token_ids = torch.full((batch, 1), 5, device=device)
    sees = prompt["cross_attention_mask"][:, -1:].repeat(batch, 1, 1, 1)

    def run() -> Tensor:
        nonlocal length
        length += 1
        logits: Tensor = model(
            input_ids=token_ids,
            attention_mask=torch.ones(batch, length, dtype=torch.int64, device=device),
            # A row for every position, of which transformers takes the last: 5.17 accepts nothing else.
            cross_attention_mask=sees.expand(-1, length, -1, -1),
            use_cache=True,
            **{CACHE: grown},
        ).logits
        return logits

    return run
