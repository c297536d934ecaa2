"""Meta's checkpoint format of Llama 3.2 Vision, converted to the one that trimserve loads.

Knows names and layouts of tensors, and writes the folder; it runs neither model. Four things differ beside names:

- Cross-attention layers are numbered among the others here, and by themselves in Meta's.
- Meta turns neighbouring pairs of a head's channels by the position, transformers channel i with i + half: the rows of
  self-attention's query and key projections are permuted.
- Meta keeps a position embedding for each (row, column) of a tile grid, transformers one for each aspect ratio.
- `<|image|>` is token 128256, the first row past the vocabulary: Meta keeps those rows in an embedding of their own.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, MllamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.image_utils import PILImageResampling
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
)

from trimserve.model.checkpoint import embedded_model_folder

__all__ = ["MetaGeometry", "by_aspect_ratio", "convert", "halves_of_pairs", "save_checkpoint"]

PATCH_SIZE = 14
VISION_LAYERS = 32
GLOBAL_LAYERS = 8
INTERMEDIATE_LAYERS = (3, 7, 15, 23, 30)
MAX_TILES = 4
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""What Meta's code has fixed, as transformers names it."""

_DECODER_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}
_ATTENTION = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
}
_VISION_LAYER = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "gate_attn": "gate_attn",
    "gate_ffn": "gate_ffn",
}
_VISION = {
    "class_embedding": "class_embedding",
    "positional_embedding": "gated_positional_embedding.embedding",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "ln_pre": "layernorm_pre",
    "ln_post": "layernorm_post",
    "pre_tile_pos_embed.gate": "pre_tile_positional_embedding.gate",
    "post_tile_pos_embed.gate": "post_tile_positional_embedding.gate",
}
_TILE_EMBEDDINGS = {
    "pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
    "post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    "gated_positional_embedding": "gated_positional_embedding.tile_embedding.weight",
}


@dataclass(frozen=True, slots=True)
class MetaGeometry:
    """Sizes of a model under the names of Meta's `params.json`, which does not have those of the vision encoder."""

    dim: int = 64
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 128256
    multiple_of: int = 16
    ffn_dim_multiplier: float | None = 1.3
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = True
    vision_num_cross_attention_layers: int = 2
    vision_chunk_size: int = 56
    """Pixels along the side of a tile."""
    vision_width: int = 64
    vision_heads: int = 4

    @property
    def fusion_schedule(self) -> tuple[int, ...]:
        """Self-attention layers that a cross-attention layer comes before, as Meta spreads them."""
        step = math.ceil(self.n_layers / self.vision_num_cross_attention_layers)
        last_first = range(self.n_layers - 1, -1, -step)[: self.vision_num_cross_attention_layers]
        return tuple(reversed(last_first))

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """The same in transformers' numbering, which counts both kinds of layers."""
        return tuple(layer + earlier for earlier, layer in enumerate(self.fusion_schedule))

    @property
    def hidden_dim(self) -> int:
        """Width inside an MLP of the decoder."""
        wanted = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            wanted = int(self.ffn_dim_multiplier * wanted)
        return math.ceil(wanted / self.multiple_of) * self.multiple_of


def convert(state: Mapping[str, Tensor], geometry: MetaGeometry) -> dict[str, Tensor]:
    """Tensors of a checkpoint in Meta's format under transformers' names, in its layouts.

    Args:
        state: a whole `consolidated.*.pth`; projections are [outputs, inputs] as in transformers.
        geometry: what `params.json` says.
    Returns:
        Every parameter of `MllamaForConditionalGeneration`, no other.
    Raises:
        KeyError: a tensor outside the layers is missing, or a tensor has a name that is not known.
    """
    named = dict(_vision_tensors(state))
    named.update(_decoder_tensors(state, geometry))
    embeddings = [state[f"text_model.{name}.weight"] for name in ("tok_embeddings", "learnable_embedding")]
    named["model.language_model.embed_tokens.weight"] = torch.cat(embeddings)
    named["model.language_model.norm.weight"] = state["text_model.norm.weight"]
    named["lm_head.weight"] = state["text_model.output.weight"]
    for kind in ("weight", "bias"):
        named[f"model.multi_modal_projector.{kind}"] = state[f"vision_model.vision_projection.{kind}"]
    return {name: tensor.contiguous() for name, tensor in named.items()}


def save_checkpoint(folder: Path, state: Mapping[str, Tensor], geometry: MetaGeometry, tokenizer_model: Path) -> None:
    """Write a checkpoint folder from Meta's tensors and tokenizer.

    The chat template is the embedded model's, which has the rules of Llama 3.2 Vision's.

    Args:
        folder: is made.
        state: see `convert`.
        geometry: see `convert`.
        tokenizer_model: Meta's `tokenizer.model`.
    """
    folder.mkdir(parents=True)
    save_file(convert(state, geometry), folder / "model.safetensors", metadata={"format": "pt"})
    _config(geometry).save_pretrained(folder)
    side = geometry.vision_chunk_size
    MllamaImageProcessorPil(
        size={"height": side, "width": side},
        max_image_tiles=MAX_TILES,
        resample=PILImageResampling.BILINEAR,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    ).save_pretrained(folder)
    tokenizer = _tokenizer(tokenizer_model)
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends).save_pretrained(folder)
    shutil.copy(embedded_model_folder() / "chat_template.jinja", folder)


def _decoder_tensors(state: Mapping[str, Tensor], geometry: MetaGeometry) -> Iterator[tuple[str, Tensor]]:
    cross = geometry.cross_attention_layers
    own = [layer for layer in range(geometry.n_layers + len(cross)) if layer not in cross]
    heads = {"wq": geometry.n_heads, "wk": geometry.n_kv_heads}
    kinds = {"layers": ("self_attn", own), "cross_attention_layers": ("cross_attn", list(cross))}
    for kind, (attention, numbers) in kinds.items():
        for name, tensor in _under(state, f"text_model.{kind}."):
            number, _, rest = name.partition(".")
            layer = f"model.language_model.layers.{numbers[int(number)]}"
            if rest.startswith("attention."):
                part = rest.split(".")[1]
                is_turned = kind == "layers" and part in heads
                weight = halves_of_pairs(tensor, heads[part]) if is_turned else tensor
                yield f"{layer}.{attention}.{_ATTENTION[part]}.weight", weight
            else:
                yield f"{layer}.{_renamed(rest, _DECODER_LAYER)}", tensor


def _vision_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _under(state, "vision_model.vision_encoder."):
        if name == "conv1._linear.weight":  # of unfolded patches: channel, row, column
            yield "model.vision_model.patch_embedding.weight", tensor.view(-1, 3, PATCH_SIZE, PATCH_SIZE)
        elif name in _TILE_EMBEDDINGS:
            yield f"model.vision_model.{_TILE_EMBEDDINGS[name]}", by_aspect_ratio(tensor)
        elif ".resblocks." in name:
            transformer, _, number, rest = name.split(".", 3)
            layer = f"model.vision_model.{transformer}.layers.{number}"
            if rest.startswith("attn."):
                yield f"{layer}.self_attn.{_ATTENTION[rest.split('.')[1]]}.weight", tensor
            else:
                yield f"{layer}.{_renamed(rest, _VISION_LAYER)}", tensor
        else:
            yield f"model.vision_model.{_renamed(name, _VISION)}", tensor


def halves_of_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection [heads * Dh, D] in transformers' order: of each head the even channels, then the odd ones.

    Args:
        weight: in Meta's order, where channels 2i and 2i + 1 are turned together.
        num_heads: Dh is even.
    """
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def by_aspect_ratio(embedding: Tensor) -> Tensor:
    """An embedding of grid places as one of aspect ratio ids.

    Args:
        embedding: [tiles, tiles, patches, Dv], by row and column in the grid of tiles.
    Returns:
        [ids + 1, tiles * patches * Dv]: tiles of a grid row by row, then zeros; id 0 is no image.
    """
    num_tiles = len(embedding)
    ratios = get_all_supported_aspect_ratios(num_tiles)
    table = embedding.new_zeros(len(ratios) + 1, num_tiles, *embedding.shape[2:])
    for ratio_id, (high, wide) in enumerate(ratios, start=1):
        table[ratio_id, : high * wide] = embedding[:high, :wide].flatten(0, 1)
    return table.flatten(1)


def _under(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name of a parameter whose module, or which itself, is in a table."""
    if name in table:
        return table[name]
    module, _, kind = name.rpartition(".")
    return f"{table[module]}.{kind}"


def _config(geometry: MetaGeometry) -> MllamaConfig:
    rope = {"rope_type": "default", "rope_theta": geometry.rope_theta}
    if geometry.use_scaled_rope:
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 8192}
    return MllamaConfig(
        vision_config={
            "hidden_size": geometry.vision_width,
            "num_hidden_layers": VISION_LAYERS,
            "num_global_layers": GLOBAL_LAYERS,
            "attention_heads": geometry.vision_heads,
            "intermediate_size": 4 * geometry.vision_width,
            "image_size": geometry.vision_chunk_size,
            "patch_size": PATCH_SIZE,
            "max_num_tiles": MAX_TILES,
            "vision_output_dim": geometry.vision_width * (1 + len(INTERMEDIATE_LAYERS)),
            "intermediate_layers_indices": list(INTERMEDIATE_LAYERS),
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(MAX_TILES)],
        },
        text_config={
            "vocab_size": geometry.vocab_size,
            "hidden_size": geometry.dim,
            "num_hidden_layers": geometry.n_layers + geometry.vision_num_cross_attention_layers,
            "cross_attention_layers": list(geometry.cross_attention_layers),
            "num_attention_heads": geometry.n_heads,
            "num_key_value_heads": geometry.n_kv_heads,
            "intermediate_size": geometry.hidden_dim,
            "rms_norm_eps": geometry.norm_eps,
            "max_position_embeddings": 131072,
            "rope_parameters": rope,
        },
        image_token_index=geometry.vocab_size,
        dtype="float32",
    )


def _tokenizer(tokenizer_model: Path) -> PreTrainedTokenizerFast:
    """Meta's vocabulary; its `<|image|>` is moved to 128256, where Meta's own code puts it before the model."""
    first = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1")
    then = ("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag")
    reserved = (f"reserved_special_token_{number}" for number in range(2, 256 - len(first) - len(then) + 2))
    special = [f"<|{name}|>" for name in (*first, *then, *reserved, "image")]
    converter = TikTokenConverter(str(tokenizer_model), extra_special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        processor_class="MllamaProcessor",
        model_input_names=["input_ids", "attention_mask"],
    )
