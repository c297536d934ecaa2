"""Whether the numbers of a config.json describe a model that can be: told before anything is built of them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import MllamaConfig

from trimserve.errors import CheckpointError

__all__ = ["check_geometry"]

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text_config": (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ),
    "vision_config": (
        "attention_heads",
        "hidden_size",
        "image_size",
        "intermediate_size",
        "max_num_tiles",
        "num_hidden_layers",
        "patch_size",
    ),
}
_MULTIPLES: Final = (
    ("text_config", "hidden_size", "num_attention_heads"),
    ("text_config", "num_attention_heads", "num_key_value_heads"),
    ("vision_config", "hidden_size", "attention_heads"),
    ("vision_config", "image_size", "patch_size"),
)
_LARGEST_COUNT: Final = 2**31 - 1
"""Fields of messages have 32 bits."""
_EPSILONS: Final = (("text_config", "rms_norm_eps"), ("vision_config", "norm_eps"))
_TOKENS_BESIDE: Final = 8
"""Rows of the token embedding beyond the vocabulary."""


def check_geometry(file: Path, config: MllamaConfig) -> None:
    """Refuse what no model can have.

    Args:
        file: that the config was read from, for the error.
        config: of a checkpoint.
    Raises:
        CheckpointError: names the field.
    """
    for complaint in _complaints(config):
        raise CheckpointError(f"{file}: {complaint}")


def _complaints(config: Any) -> Iterator[str]:
    for part, names in _COUNTS.items():
        for name in names:
            if not 1 <= (value := getattr(getattr(config, part), name)) <= _LARGEST_COUNT:
                yield f"{part}.{name} must be {'at least 1' if value < 1 else f'at most {_LARGEST_COUNT}'}, got {value}"
    for part, name, divisor in _MULTIPLES:
        whole, each = (getattr(getattr(config, part), field) for field in (name, divisor))
        if whole % each:
            yield f"{part}.{name} must be a multiple of {divisor}, {each}, got {whole}"
    for part, name in _EPSILONS:
        if not 0 <= (value := getattr(getattr(config, part), name)) < math.inf:
            yield f"{part}.{name} must be finite and at least 0, got {value}"
    text, vision = config.text_config, config.vision_config
    if (head := text.hidden_size // text.num_attention_heads) % 2:
        yield f"text_config.hidden_size over num_attention_heads must be even, got {head}"
    if (own := getattr(text, "head_dim", None)) not in (None, head):
        yield f"text_config.head_dim must be {head}, hidden_size over num_attention_heads, got {own}"
    if vision.num_channels != 3:
        yield f"vision_config.num_channels must be 3, got {vision.num_channels}"
    yield from _places("text_config.cross_attention_layers", text.cross_attention_layers, text.num_hidden_layers)
    yield from _places(
        "vision_config.intermediate_layers_indices", vision.intermediate_layers_indices, vision.num_hidden_layers
    )
    width = vision.hidden_size * (1 + len(vision.intermediate_layers_indices))
    if vision.vision_output_dim != width:
        made = "hidden_size of the last layer and of each of intermediate_layers_indices"
        yield f"vision_config.vision_output_dim must be {width}, {made}, got {vision.vision_output_dim}"
    rows = text.vocab_size + _TOKENS_BESIDE
    if not 0 <= config.image_token_index < rows:
        yield f"image_token_index must be in [0, {rows}), rows of the embedding, got {config.image_token_index}"
    if text.pad_token_id is not None and not -rows <= text.pad_token_id < rows:
        yield f"text_config.pad_token_id must be in [-{rows}, {rows}), rows of the embedding, got {text.pad_token_id}"


def _places(name: str, layers: list[int] | None, num_layers: int) -> Iterator[str]:
    layers = layers or []
    if not layers or len({*layers}) < len(layers) or min(layers) < 0 or max(layers) >= num_layers:
        yield f"{name} must be different layers of {num_layers}, at least one, got {layers}"
