"""Geometry and first weights of trimserve-tiny, and the auxiliary head that only training uses."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from training.marks import NUM_MARKS
from training.scenes import COLOURS, TILE_SIZE
from training.tokenizer import NUM_TEXT_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE

if TYPE_CHECKING:
    from training.batches import Batch

__all__ = ["PATCH_SIZE", "PatchHead", "encode_images", "make_config", "make_model", "read_batch", "token_id"]

PATCH_SIZE = 8
"""Pixels along the side of a patch: 64 patches and a class token in a tile."""


def token_id(token: str) -> int:
    """Id of one of the special tokens."""
    return NUM_TEXT_TOKENS + SPECIAL_TOKENS.index(token)


def make_config(narrower: int = 1) -> MllamaConfig:
    """The geometry. It is part of the format: later training may change weights only.

    Args:
        narrower: what widths are divided by; layers, heads, tiles, patches and tokens stay as they are.
    """
    vision_width, text_width = 96 // narrower, 192 // narrower
    vision = MllamaVisionConfig(
        hidden_size=vision_width,
        num_hidden_layers=4,
        num_global_layers=2,
        attention_heads=4,
        intermediate_size=4 * vision_width,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
        max_num_tiles=4,
        intermediate_layers_indices=[1, 2, 3],
        vision_output_dim=4 * vision_width,
        initializer_range=0.06,
    )
    text = MllamaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=text_width,
        num_hidden_layers=6,
        cross_attention_layers=[1, 3, 5],
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=512 // narrower,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=[token_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
        pad_token_id=token_id("<|finetune_right_pad_id|>"),
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB_SIZE)


def make_model(seed: int, narrower: int = 1) -> MllamaForConditionalGeneration:
    """A fresh model in float32: gates open, positions as sines of the place in the whole image.

    Args:
        seed: of the random weights.
        narrower: see `make_config`.
    """
    torch.manual_seed(seed)
    config = make_config(narrower)
    model = MllamaForConditionalGeneration(config)
    vision = model.model.vision_model
    with torch.no_grad():
        for index in config.get_text_config().cross_attention_layers:
            layer = model.model.language_model.layers[index]
            layer.cross_attn_attn_gate.fill_(1.0)
            layer.cross_attn_mlp_gate.fill_(1.0)
        for layer in vision.global_transformer.layers:
            layer.gate_attn.fill_(1.0)
            layer.gate_ffn.fill_(1.0)
        for embedding in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
            embedding.gate.fill_(0.5)
        positions = vision.gated_positional_embedding
        positions.gate.fill_(math.atanh(0.5))
        positions.tile_embedding.weight.normal_(std=0.02)
        for number, (high, wide) in enumerate(vision.config.supported_aspect_ratios or (), start=1):
            places = positions.tile_embedding.weight[number].view(4, -1, positions.hidden_size)
            places[: high * wide, 1:] += _sines(high, wide, positions.hidden_size)
    return model


def encode_images(
    model: MllamaForConditionalGeneration,
    pixel_values: Tensor,
    aspect_ratio_ids: Tensor,
    aspect_ratio_mask: Tensor,
) -> Tensor:
    """Visual features of a batch of images, as the text decoder gets them.

    Args:
        model: whose vision encoder and projector are used.
        pixel_values: [B, images, 4, 3, 64, 64].
        aspect_ratio_ids: int64 [B, images].
        aspect_ratio_mask: int64 [B, images, 4].
    Returns:
        [B, images * 4 * 65, 192]; rows of padding tiles are there and mean nothing.
    """
    seen = model.model.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask).last_hidden_state
    states: Tensor = model.model.multi_modal_projector(seen)
    return states.reshape(pixel_values.shape[0], -1, states.shape[-1])


def read_batch(model: MllamaForConditionalGeneration, batch: "Batch") -> tuple[Tensor, Tensor]:
    """Read a batch, in bfloat16 where autocast says so.

    Args:
        model: on the batch's device.
        batch: B rows.
    Returns:
        logits: [L, V], for each label.
        features: [B, images * 4 * 65, D], the visual features.
    """
    device = batch.input_ids.device
    mask = torch.zeros(batch.attention_mask.shape, device=device).masked_fill(~batch.attention_mask, -1e9)
    with torch.autocast(device.type, torch.bfloat16):
        features = encode_images(model, batch.pixel_values, batch.aspect_ratio_ids, batch.aspect_ratio_mask)
        hidden = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=mask,
            cross_attention_states=features,
            cross_attention_mask=batch.cross_attention_mask,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden[batch.labels >= 0]), features


class PatchHead(nn.Module):
    """Reads from each visual feature what covers its patch; speeds learning, is not exported."""

    def __init__(self, hidden_size: int) -> None:
        """Make the head.

        Args:
            hidden_size: width of a visual feature.
        """
        super().__init__()
        self.mark = nn.Linear(hidden_size, NUM_MARKS)
        self.colour = nn.Linear(hidden_size, len(COLOURS))

    def forward(self, features: Tensor, marks: Tensor, colours: Tensor) -> Tensor:
        """Mean loss over the patches of real tiles.

        Args:
            features: [B, images * 4 * 65, 192].
            marks: int64 [B, images * 4, 64], -100 where there is no tile.
            colours: int64 [B, images * 4, 64], -100 where nothing covers the patch.
        """
        patches = features.view(*marks.shape[:2], -1, features.shape[-1])[:, :, 1:]
        mark_loss = nn.functional.cross_entropy(self.mark(patches).flatten(0, 2), marks.flatten())
        covered = colours >= 0  # nowhere, where all pictures are pages and charts
        colour_loss = nn.functional.cross_entropy(self.colour(patches[covered]), colours[covered], reduction="sum")
        return mark_loss * 4 + colour_loss / covered.sum().clamp(min=1)


def _sines(tiles_high: int, tiles_wide: int, width: int) -> Tensor:
    side = TILE_SIZE // PATCH_SIZE
    rates = 1.0 / 50.0 ** (torch.arange(width // 4) / (width // 4))
    down, across = (torch.arange(tiles * side)[:, None] * rates * 2 for tiles in (tiles_high, tiles_wide))
    rows = torch.cat([down.sin(), down.cos()], -1)[:, None].expand(-1, len(across), -1)
    columns = torch.cat([across.sin(), across.cos()], -1)[None].expand(len(down), -1, -1)
    grid = torch.cat([rows, columns], -1) * 0.7
    tiles = grid.view(tiles_high, side, tiles_wide, side, width).transpose(1, 2)
    return tiles.reshape(tiles_high * tiles_wide, side * side, width)
