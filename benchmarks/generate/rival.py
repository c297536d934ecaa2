"""transformers with the same prompt: its modules as its `generate` calls them, with a growing or a static cache."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.generate.setting import QUESTION, Setting, picture
from benchmarks.transformers_step import CACHE, cache_of, growing_step
from tests.model.peer import Peer

__all__ = ["Rival"]

_ROOM = 16
"""Positions of a static cache behind the prompt."""


class Rival:
    """transformers' model with Meta's semantics, sdpa, and one prompt."""

    def __init__(self, folder: Path) -> None:
        """Load it in float32."""
        self._peer = Peer(folder)
        self.model: Any = self._peer.model
        self._inputs: dict[str, Tensor] = {}

    def to(self, dtype: torch.dtype) -> None:
        """Convert the weights."""
        self.model.to(dtype)

    @property
    def token_ids(self) -> list[int]:
        """Of the prompt."""
        token_ids: list[int] = self._inputs["input_ids"][0].tolist()
        return token_ids

    def ask(self, setting: Setting) -> None:
        """Take a prompt; its image gets a full canvas of tiles."""
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        processor = self._peer.processor
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        token_ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        image = Image.open(io.BytesIO(picture(setting, self.model.config.vision_config.image_size)))
        inputs = self._peer.inputs(token_ids, [image])
        self._inputs = inputs | {"pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def encode(self) -> Tensor:
        """The image's features [tiles, features of a tile, D]."""
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        states = self.model.model.vision_model(**{name: self._inputs[name] for name in names}).last_hidden_state
        features: Tensor = self.model.model.multi_modal_projector(states)
        return features.reshape(-1, states.shape[-2], features.shape[-1])

    def prefill(self, features: Tensor) -> Any:
        """The prompt's output, with a cache that grows."""
        names = ("input_ids", "attention_mask", "cross_attention_mask")
        inputs = {name: self._inputs[name] for name in names}
        return self.model(**inputs, cross_attention_states=features, use_cache=True, logits_to_keep=1)

    def step(self, cache: Any, batch: int) -> Callable[[], Tensor]:
        """A decode step of so many sequences; each call is one position longer."""
        return growing_step(self.model, self._inputs, cache, batch)

    def compiled_step(self, batch: int) -> Callable[[], Tensor]:
        """The same with a static cache and `torch.compile`, from transformers 5.18 on; always the same position."""
        length = self._inputs["input_ids"].shape[1]
        options = {"max_new_tokens": _ROOM, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        cache = cache_of(self.model.generate(**self._inputs, **options, cache_implementation="static"))
        for layer in cache.layers:
            layer.keys, layer.values = (part.repeat_interleave(batch, 0) for part in (layer.keys, layer.values))
        texts = [layer for layer in cache.layers if layer.keys.shape[2] == length + _ROOM - 1]
        inputs = {
            "input_ids": torch.full((batch, 1), 5),
            "cross_attention_mask": self._inputs["cross_attention_mask"][:, -1:].repeat(batch, 1, 1, 1),
            "use_cache": True,
            "attention_mask": torch.ones(batch, length + _ROOM - 1, dtype=torch.int64),
            "position_ids": torch.full((batch, 1), length),
        }
        forward: Callable[..., Any] = torch.compile(self.model.forward, dynamic=False)

        def run() -> Tensor:
            for layer in texts:
                layer.cumulative_length.fill_(length)
            logits: Tensor = forward(**inputs, **{CACHE: cache}).logits
            return logits

        return run
