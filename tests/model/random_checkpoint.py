"""Checkpoints with random weights in drawn geometries, on which a model that ignores its image cannot pass."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from tests.model.tiny_tokenizer import TinyTokens, save_tiny_processor
from tests.trimming.policies.trained import drawn_modules
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.codebook import save_codebook
from trimserve.model.loading import describe_model
from trimserve.model.trained_file import save_trained, shape_of

__all__ = ["Geometry", "draw_geometry", "equip", "save_random_checkpoint"]


@dataclass(frozen=True)
class Geometry:
    """What a test draws of an Mllama."""

    num_kv_heads: int = 2
    heads_per_kv: int = 2
    head_dim: int = 16
    num_layers: int = 5
    cross_layers: tuple[int, ...] = (1, 3)
    max_tiles: int = 4
    patches_per_side: int = 3
    patch_size: int = 8
    vision_layers: int = 4
    global_layers: int = 2
    intermediate_layers: tuple[int, ...] = (1, 2)
    intermediate_size: int = 48
    max_position_embeddings: int = 512
    norm_epsilon: float = 1e-5

    @property
    def tile_size(self) -> int:
        """Pixels along the side of a tile."""
        return self.patches_per_side * self.patch_size


def draw_geometry(seed: int) -> Geometry:
    """A geometry of its own for every seed."""
    rng = random.Random(seed)
    num_layers = rng.randint(4, 7)
    vision_layers = rng.randint(2, 4)
    return Geometry(
        num_kv_heads=rng.choice([1, 2, 3]),
        heads_per_kv=rng.choice([1, 2, 4]),
        head_dim=rng.choice([6, 8, 10, 16]),
        num_layers=num_layers,
        cross_layers=tuple(sorted(rng.sample(range(num_layers), rng.randint(1, 3)))),
        max_tiles=rng.choice([1, 2, 3, 4, 4, 6]),
        patches_per_side=rng.choice([2, 3, 5]),
        patch_size=rng.choice([4, 8]),
        vision_layers=vision_layers,
        global_layers=rng.randint(1, 2),
        intermediate_layers=tuple(sorted(rng.sample(range(vision_layers), rng.randint(1, vision_layers)))),
        intermediate_size=rng.choice([32, 48]),
        norm_epsilon=0.1,  # of some weight beside a mean square of 1, so that no norm can go without
    )


def _config(geometry: Geometry, tokens: TinyTokens) -> MllamaConfig:
    vision_width = 32
    return MllamaConfig(
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": geometry.vision_layers,
            "num_global_layers": geometry.global_layers,
            "attention_heads": 2,
            "intermediate_size": 48,
            "image_size": geometry.tile_size,
            "patch_size": geometry.patch_size,
            "max_num_tiles": geometry.max_tiles,
            "vision_output_dim": vision_width * (1 + len(geometry.intermediate_layers)),
            "intermediate_layers_indices": list(geometry.intermediate_layers),
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(geometry.max_tiles)],
        },
        text_config={
            "vocab_size": tokens.vocab_size,
            "hidden_size": geometry.num_kv_heads * geometry.heads_per_kv * geometry.head_dim,
            "num_hidden_layers": geometry.num_layers,
            "cross_attention_layers": list(geometry.cross_layers),
            "num_attention_heads": geometry.num_kv_heads * geometry.heads_per_kv,
            "num_key_value_heads": geometry.num_kv_heads,
            "intermediate_size": geometry.intermediate_size,
            "rms_norm_eps": geometry.norm_epsilon,
            "max_position_embeddings": geometry.max_position_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokens.bos,
            "eos_token_id": list(tokens.eos_ids),
            "pad_token_id": tokens.eos_ids[0],
        },
        image_token_index=tokens.image_token_id,
    )


def save_random_checkpoint(folder: Path, geometry: Geometry, seed: int = 0) -> None:
    """Write a checkpoint whose gates are open and whose logits vary."""
    tokens = save_tiny_processor(folder, tile_size=geometry.tile_size, max_tiles=geometry.max_tiles)
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(_config(geometry, tokens))
    generation_config = GenerationConfig(bos_token_id=tokens.bos, eos_token_id=list(tokens.eos_ids))
    generation_config.pad_token_id = tokens.eos_ids[0]
    model.generation_config = generation_config
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "gate" in name.split(".")[-1]:
                parameter.uniform_(0.5, 1.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "lm_head" in name:
                parameter.normal_(0, 3 * parameter.shape[1] ** -0.5)
            elif "patch_embedding" in name:
                parameter.normal_(0, (parameter[0].numel()) ** -0.5)
            elif "embed" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def equip(config: ModelConfig, codebook: Path) -> ModelConfig:
    """The same model with all that policies need, drawn, and itself as guide.

    Args:
        config: of the model.
        codebook: file for prototypes; beside it come compressors that make 3 rows of a tile.
    """
    info = describe_model(config, EngineConfig())
    prototypes = torch.randn(3, info.hidden_size, generator=torch.Generator().manual_seed(0))
    save_codebook(codebook, F.normalize(prototypes, dim=1), info, config.intermediate_features)
    files = []
    for method, module in drawn_modules(shape_of(info, 3)).items():
        files.append(codebook.with_name(f"{method}.safetensors"))
        save_trained(files[-1], method, module, info, config.intermediate_features, [], {})
    return config.model_copy(update={"codebook": codebook, "guide_model": config.model, "compressor": tuple(files)})
