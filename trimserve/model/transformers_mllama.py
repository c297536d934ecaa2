"""What trimserve borrows of transformers' Mllama: the attributes it takes, their shapes, and the calls it makes.

No other file of trimserve names transformers' model classes or their attributes, so a release that renames one is met
here. `tests/model/test_transformers_mllama.py` checks each borrowed thing under its name. What is computed with the
parts, and where their weights lie in memory, is not known here.

Letters: D width of the decoder, Dv of the vision encoder, H query heads, Hkv key-value heads, Dh width of a head, F and
Fv widths inside an MLP, V tokens. A linear layer is [outputs, inputs].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaRotaryEmbedding,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextRMSNorm,
    MllamaVisionEncoderLayer,
)

from trimserve.errors import CheckpointError
from trimserve.model.checkpoint import text_config, vision_config

__all__ = [
    "CrossLayerParts",
    "DecoderParts",
    "MllamaForConditionalGeneration",
    "NormParts",
    "Rotary",
    "SelfLayerParts",
    "VisionLayerParts",
    "VisionParts",
    "compute_rotary",
    "decoder_linears",
    "decoder_parts",
    "feature_kv_module_names",
    "fused_linears",
    "meta_model",
    "rotary_of",
    "step_modules",
    "vision_layer_parts",
    "vision_module_names",
    "vision_parts",
]


@dataclass(frozen=True, slots=True)
class NormParts:
    """An RMS norm."""

    weight: Tensor
    """[D], or [Dh] of queries and keys."""
    epsilon: float


@dataclass(frozen=True, slots=True)
class SelfLayerParts:
    """A self-attention layer of the decoder."""

    input_norm: NormParts
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    """[H * Dh, D], then twice [Hkv * Dh, D]; without biases."""
    output: nn.Linear
    """[D, H * Dh]"""
    mlp_norm: NormParts
    gate_up: tuple[nn.Linear, nn.Linear]
    """[F, D] each; without biases."""
    down: nn.Linear
    """[D, F]"""


@dataclass(frozen=True, slots=True)
class CrossLayerParts:
    """A cross-attention layer of the decoder; what has no shape here is as in `SelfLayerParts`."""

    input_norm: NormParts
    query: nn.Linear
    """[H * Dh, D]"""
    kv: tuple[nn.Linear, nn.Linear]
    """[Hkv * Dh, D] each; without biases."""
    q_norm: NormParts
    k_norm: NormParts
    output: nn.Linear
    attention_gate: Tensor
    """[1]; its tanh scales what attention adds."""
    mlp_norm: NormParts
    gate_up: tuple[nn.Linear, nn.Linear]
    down: nn.Linear
    mlp_gate: Tensor
    """[1]; its tanh scales what the MLP adds."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding of the decoder: the angle of position p is p * frequencies."""

    frequencies: Tensor
    """float32 [Dh / 2]"""
    scaling: float
    """Factor of cosines and sines."""


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """The text decoder."""

    embed_tokens: nn.Embedding
    """int64 [R] -> [R, D]"""
    rotary: Rotary
    layers: Sequence[SelfLayerParts | CrossLayerParts]
    norm: NormParts
    lm_head: nn.Linear
    """[V, D]"""


@dataclass(frozen=True, slots=True)
class VisionLayerParts:
    """A layer of the vision encoder."""

    attention_norm: Callable[[Tensor], Tensor]
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    """[Dv, Dv] each; without biases."""
    num_heads: int
    head_dim: int
    scale: float
    """Of queries times keys."""
    output: nn.Linear
    """[Dv, Dv]"""
    mlp_norm: Callable[[Tensor], Tensor]
    first: nn.Linear
    """[Fv, Dv]"""
    activation: Callable[[Tensor], Tensor]
    second: nn.Linear
    """[Dv, Fv]"""
    gates: tuple[Tensor, Tensor] | None
    """[1] each; their tanh scales what attention and MLP add. None in local layers."""


@dataclass(frozen=True, slots=True)
class VisionParts:
    """The vision encoder and the projector; functions have the names of transformers' modules."""

    num_patches: int
    """Patches of a tile and the class token."""
    patch_embedding: nn.Conv2d
    """[tiles, 3, side, side] -> [tiles, Dv, rows, columns]"""
    pre_tile_positional_embedding: Callable[[Tensor, Tensor], Tensor]
    """Hidden [1, tiles, patches, Dv], aspect ratio ids int64 [1, 1] -> hidden; so are the next two."""
    gated_positional_embedding: Callable[[Tensor, Tensor], Tensor]
    post_tile_positional_embedding: Callable[[Tensor, Tensor], Tensor]
    apply_class_embedding: Callable[[Tensor], Tensor]
    """[tiles, patches, Dv] -> [tiles, 1 + patches, Dv], the class token first."""
    layernorm_pre: Callable[[Tensor], Tensor]
    layernorm_post: Callable[[Tensor], Tensor]
    local_layers: Sequence[VisionLayerParts]
    global_layers: Sequence[VisionLayerParts]
    projector: nn.Linear
    """[D, Dv * (1 + collected layers)]"""


def meta_model(config: MllamaConfig, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """The model of a config on the meta device; its parameters have the names of a current checkpoint's tensors.

    Raises:
        CheckpointError: transformers makes no model of the config.
    """
    file, activation = f"{config.name_or_path}/config.json", vision_config(config).hidden_act
    if activation not in ACT2FN:
        raise CheckpointError(f"{file}: vision_config.hidden_act must be one that transformers has, got {activation}")
    try:
        with torch.device("meta"):
            model: MllamaForConditionalGeneration = MllamaForConditionalGeneration._from_config(config, dtype=dtype)
    except Exception as error:  # whatever it meets
        raise CheckpointError(f"{file}: transformers makes no model of it: {type(error).__name__}: {error}") from error
    return model


def rotary_of(config: MllamaConfig) -> Rotary:
    """The rotary position embedding of a config; raises whatever transformers meets in its parameters."""
    rotary = MllamaRotaryEmbedding(text_config(config))
    return Rotary(rotary.inv_freq, rotary.attention_scaling)


def compute_rotary(model: MllamaForConditionalGeneration, device: torch.device) -> None:
    """Compute the frequencies of a `meta_model`, the one thing that is in no checkpoint."""
    model.model.language_model.rotary_emb = MllamaRotaryEmbedding(text_config(model.config)).to(device)


def decoder_parts(model: MllamaForConditionalGeneration) -> DecoderParts:
    """The text decoder of a model."""
    text = model.model.language_model
    return DecoderParts(
        embed_tokens=text.embed_tokens,
        rotary=Rotary(text.rotary_emb.inv_freq, text.rotary_emb.attention_scaling),
        layers=[
            _cross_layer(layer) if isinstance(layer, MllamaCrossAttentionDecoderLayer) else _self_layer(layer)
            for layer in text.layers
        ],
        norm=_norm(text.norm),
        lm_head=model.lm_head,
    )


def decoder_linears(model: MllamaForConditionalGeneration) -> Iterator[nn.Linear]:
    """Every linear layer of the decoder's layers, and the output layer."""
    for module in (*model.model.language_model.layers.modules(), model.lm_head):
        if isinstance(module, nn.Linear):
            yield module


def step_modules(model: MllamaForConditionalGeneration) -> Iterator[nn.Module]:
    """Modules whose own parameters a decode step reads whole.

    That leaves out the embedding, of which it reads rows, and the projections of visual features.
    """
    for name, module in model.named_modules():
        is_of_step = name.startswith(("model.language_model.layers", "model.language_model.norm", "lm_head"))
        if is_of_step and not name.endswith(("cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.k_norm")):
            yield module


def vision_parts(model: MllamaForConditionalGeneration) -> VisionParts:
    """The vision encoder of a model, and the projector."""
    vision = model.model.vision_model
    return VisionParts(
        num_patches=vision.num_patches,
        patch_embedding=vision.patch_embedding,
        pre_tile_positional_embedding=vision.pre_tile_positional_embedding,
        gated_positional_embedding=vision.gated_positional_embedding,
        post_tile_positional_embedding=vision.post_tile_positional_embedding,
        apply_class_embedding=vision.apply_class_embedding,
        layernorm_pre=vision.layernorm_pre,
        layernorm_post=vision.layernorm_post,
        local_layers=[vision_layer_parts(layer) for layer in vision.transformer.layers],
        global_layers=[vision_layer_parts(layer) for layer in vision.global_transformer.layers],
        projector=model.model.multi_modal_projector,
    )


def vision_module_names() -> tuple[str, ...]:
    """How the names of modules begin that an image's visual features are made of."""
    return "model.vision_model.", "model.multi_modal_projector"


def feature_kv_module_names() -> tuple[str, ...]:
    """How the names of modules end that make keys and values of visual features."""
    return ".cross_attn.k_proj", ".cross_attn.v_proj", ".cross_attn.k_norm"


def vision_layer_parts(layer: nn.Module) -> VisionLayerParts:
    """One layer of the vision encoder."""
    assert isinstance(layer, MllamaVisionEncoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    return VisionLayerParts(
        attention_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        first=mlp.fc1,
        activation=mlp.activation_fn,
        second=mlp.fc2,
        gates=(layer.gate_attn, layer.gate_ffn) if layer.is_gated else None,
    )


def fused_linears(model: MllamaForConditionalGeneration) -> Iterator[tuple[nn.Linear, ...]]:
    """Linear layers that are multiplied together, and whose weights are rows of one tensor therefore."""
    for layer in decoder_parts(model).layers:
        yield layer.qkv if isinstance(layer, SelfLayerParts) else layer.kv
        yield layer.gate_up
    vision = vision_parts(model)
    for vision_layer in (*vision.local_layers, *vision.global_layers):
        yield vision_layer.qkv


def _self_layer(layer: nn.Module) -> SelfLayerParts:
    assert isinstance(layer, MllamaSelfAttentionDecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    return SelfLayerParts(
        input_norm=_norm(layer.input_layernorm),
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
    )


def _cross_layer(layer: MllamaCrossAttentionDecoderLayer) -> CrossLayerParts:
    attention, mlp = layer.cross_attn, layer.mlp
    return CrossLayerParts(
        input_norm=_norm(layer.input_layernorm),
        query=attention.q_proj,
        kv=(attention.k_proj, attention.v_proj),
        q_norm=_norm(attention.q_norm),
        k_norm=_norm(attention.k_norm),
        output=attention.o_proj,
        attention_gate=layer.cross_attn_attn_gate,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        mlp_gate=layer.cross_attn_mlp_gate,
    )


def _norm(norm: MllamaTextRMSNorm) -> NormParts:
    return NormParts(norm.weight, norm.variance_epsilon)
