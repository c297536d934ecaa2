"""Writes a checkpoint as large as Llama-3.2-Vision 11B: its geometry, its tensor names, its vocabulary, random weights.

    python -m benchmarks.real_size_model --out out/real-size-model

It takes 20 GiB of disk and little memory: a shard is written at a time. Its text makes no sense, but it loads and costs
what that model does. The checkpoint is not to be committed.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, MllamaConfig

from benchmarks.bench_model import draw_parameter, write_small_files
from trimserve.model.checkpoint import embedded_model_folder, text_config, vision_config
from trimserve.model.json_object import read_json
from trimserve.model.transformers_mllama import meta_model

__all__ = ["REAL_SIZE_MODEL", "write_real_size_model"]

REAL_SIZE_MODEL: Final = Path("out/real-size-model")
"""Where benchmarks look for the checkpoint when nobody says otherwise."""

_SHARD_BYTES: Final = 2 << 30
_NAMES_OF_META: Final = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def write_real_size_model(folder: Path, geometry: dict[str, Any] | None = None, seed: int = 0) -> None:
    """Write the checkpoint in bfloat16.

    Args:
        folder: made if it is not there.
        geometry: `text_config` and `vision_config` of another model; None is the 11B model's, transformers' default.
        seed: of the weights.
    """
    special = _special_tokens()
    given = geometry or {"text_config": {"rope_parameters": _ROPE}, "vision_config": {}}
    config = MllamaConfig(
        text_config={**given["text_config"], **special}, vision_config=given["vision_config"], dtype="bfloat16"
    )
    text, vision = text_config(config), vision_config(config)
    config.image_token_index = text.vocab_size
    write_small_files(
        folder,
        {"text_config": text.to_dict(), "vision_config": vision.to_dict(), "trim": {"k_ratio": 0.2}},
    )
    config.save_pretrained(folder)
    GenerationConfig(**special, do_sample=False).save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(_shards(config, seed), 1):
        name = f"model-{index:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _special_tokens() -> dict[str, Any]:
    generation = read_json(embedded_model_folder() / "generation_config.json")
    return {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _shards(config: MllamaConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    for name, parameter in meta_model(config, torch.bfloat16).named_parameters():
        if shard and sum(tensor.nbytes for tensor in shard.values()) + parameter.nbytes > _SHARD_BYTES:
            yield shard
            shard = {}
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        draw_parameter(name, weight, generator)
        shard[_name_of_meta(name)] = weight
    yield shard


def _name_of_meta(name: str) -> str:
    for ours, theirs in _NAMES_OF_META.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REAL_SIZE_MODEL, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    write_real_size_model(arguments.out, seed=arguments.seed)
    print(arguments.out)


if __name__ == "__main__":
    main()
