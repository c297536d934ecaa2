"""Numbers of a config.json that no model can have are refused by name, whoever would have stumbled over them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.model.loading import describe_model, embedded_model_folder

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": "x"}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 12,
    "long_factor": [2.0] * 12,
    "original_max_position_embeddings": 512,
    "factor": 4.0,
}


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "hidden_size", 0, "hidden_size must be at least 1, got 0"),
        ("text_config", "num_attention_heads", 0, "num_attention_heads must be at least 1, got 0"),
        ("text_config", "num_attention_heads", 7, "hidden_size must be a multiple of num_attention_heads, 7"),
        ("text_config", "num_key_value_heads", 0, "num_key_value_heads must be at least 1, got 0"),
        ("text_config", "num_key_value_heads", 3, "num_attention_heads must be a multiple of num_key_value_heads, 3"),
        ("text_config", "num_hidden_layers", 0, "num_hidden_layers must be at least 1, got 0"),
        ("text_config", "vocab_size", -1, "vocab_size must be at least 1, got -1"),
        ("text_config", "max_position_embeddings", 0, "max_position_embeddings must be at least 1, got 0"),
        ("text_config", "cross_attention_layers", [], "must be different layers of"),
        ("text_config", "cross_attention_layers", [1, 1], "must be different layers of"),
        ("text_config", "cross_attention_layers", [99], "must be different layers of"),
        ("text_config", "cross_attention_layers", [-1], "must be different layers of"),
        ("vision_config", "patch_size", 0, "patch_size must be at least 1, got 0"),
        ("vision_config", "patch_size", 13, "image_size must be a multiple of patch_size, 13"),
        ("vision_config", "attention_heads", 0, "attention_heads must be at least 1, got 0"),
        ("vision_config", "intermediate_layers_indices", [99], "must be different layers of"),
        ("vision_config", "num_channels", 4, "num_channels must be 3, got 4"),
        ("vision_config", "vision_output_dim", 7, "vision_output_dim must be "),
        (None, "image_token_index", -1, "image_token_index must be in [0, 648), rows of the embedding, got -1"),
        (None, "image_token_index", 2**40, "image_token_index must be in [0, 648), rows of the embedding"),
        ("text_config", "pad_token_id", 648, "pad_token_id must be in [-648, 648), rows of the embedding, got 648"),
        ("text_config", "rms_norm_eps", math.nan, "rms_norm_eps must be finite and at least 0, got nan"),
        ("text_config", "head_dim", 32, "head_dim must be 24, hidden_size over num_attention_heads, got 32"),
        ("text_config", "rope_parameters", {"rope_type": "none"}, "rope_parameters: KeyError: 'none', got {"),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}, "TypeError: "),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 0}, "must give finite angles, got {"),
        ("text_config", "rope_parameters", YARN, "rope_parameters: TypeError: "),
        ("text_config", "rope_parameters", LONG_ROPE, "rope_type longrope is not supported"),
        ("vision_config", "norm_eps", -1.0, "norm_eps must be finite and at least 0, got -1.0"),
        ("vision_config", "hidden_act", "none", "hidden_act must be one that transformers has, got none"),
        ("text_config", "max_position_embeddings", 2**40, "max_position_embeddings must be at most 2147483647, got"),
        ("text_config", "hidden_size", 16 * (2**27 - 1), "transformers makes no model of it: RuntimeError: "),
    ],
)
def test_what_no_model_can_have_is_refused_by_its_name(
    tmp_path: Path, part: str | None, field: str, value: Any, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])[field] = value
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        describe_model(ModelConfig(model=str(folder)), EngineConfig())
    assert str(caught.value).startswith(f"{folder}/config.json: ")
    assert part is None or f"{part}." in str(caught.value) or "makes no model" in str(caught.value)
    assert message in str(caught.value)
