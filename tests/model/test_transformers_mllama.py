"""Each thing borrowed of transformers' Mllama, under its name: a release that changes one fails in its test.

The first tables are what trimserve relies on (`model/transformers_mllama.py`); the last is what training, benchmarks
and the peer pass to transformers' own forward passes.
"""

import re
from inspect import signature
from operator import attrgetter
from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama

from benchmarks.rival import CACHE
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.model.transformers_mllama import compute_rotary, decoder_linears, fused_linears, meta_model

GEOMETRY = Geometry(heads_per_kv=3, head_dim=10, intermediate_size=40)  # of layers 1 and 3 attend to features
SIZES = {"D": 60, "Hkv*Dh": 20, "Dh": 10, "F": 40, "Dv": 32, "Fv": 48, "C": 32 * 3, "P": 10, "side": 8, "tiles": 4}
SIZES |= {"tiles*P*Dv": 4 * 10 * 32, "tiles*Dv": 4 * 32, "ratios": 9, "1": 1, "3": 3}

TEXT, VISION = "model.language_model", "model.vision_model"
SELF, CROSS = f"{TEXT}.layers.0", f"{TEXT}.layers.1"
LOCAL, GLOBAL = f"{VISION}.transformer.layers.0", f"{VISION}.global_transformer.layers.0"

MLP = {"mlp.gate_proj.weight": "F D", "mlp.up_proj.weight": "F D", "mlp.down_proj.weight": "D F"}
NORMS = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
ATTENTION = {"q_proj.weight": "D D", "k_proj.weight": "Hkv*Dh D", "v_proj.weight": "Hkv*Dh D", "o_proj.weight": "D D"}
GATES = {"cross_attn_attn_gate": "1", "cross_attn_mlp_gate": "1"}
VISION_LAYER = {
    **{f"self_attn.{name}.weight": "Dv Dv" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{
        f"{norm}.{part}": "Dv"
        for norm in ("input_layernorm", "post_attention_layernorm")
        for part in ("weight", "bias")
    },
    "mlp.fc1.weight": "Fv Dv",
    "mlp.fc1.bias": "Fv",
    "mlp.fc2.weight": "Dv Fv",
    "mlp.fc2.bias": "Dv",
}
PARAMETERS = {
    "lm_head.weight": "V D",
    f"{TEXT}.embed_tokens.weight": "rows D",
    f"{TEXT}.norm.weight": "D",
    **{f"{SELF}.{name}": shape for name, shape in {**NORMS, **MLP}.items()},
    **{f"{SELF}.self_attn.{name}": shape for name, shape in ATTENTION.items()},
    **{f"{CROSS}.{name}": shape for name, shape in {**NORMS, **MLP, **GATES}.items()},
    **{f"{CROSS}.cross_attn.{name}": shape for name, shape in ATTENTION.items()},
    **{f"{CROSS}.cross_attn.{name}.weight": "Dh" for name in ("q_norm", "k_norm")},
    **{f"{LOCAL}.{name}": shape for name, shape in VISION_LAYER.items()},
    **{f"{GLOBAL}.{name}": shape for name, shape in VISION_LAYER.items()},
    **{f"{GLOBAL}.{name}": "1" for name in ("gate_attn", "gate_ffn")},
    f"{VISION}.class_embedding": "Dv",
    f"{VISION}.patch_embedding.weight": "Dv 3 side side",
    f"{VISION}.gated_positional_embedding.gate": "1",
    f"{VISION}.gated_positional_embedding.embedding": "P Dv",
    f"{VISION}.gated_positional_embedding.tile_embedding.weight": "ratios tiles*P*Dv",
    **{f"{VISION}.{name}_tile_positional_embedding.gate": "1" for name in ("pre", "post")},
    **{f"{VISION}.{name}_tile_positional_embedding.embedding.weight": "ratios tiles*Dv" for name in ("pre", "post")},
    **{f"{VISION}.{norm}.{part}": "Dv" for norm in ("layernorm_pre", "layernorm_post") for part in ("weight", "bias")},
    "model.multi_modal_projector.weight": "D C",
    "model.multi_modal_projector.bias": "D",
}
CLASSES = {
    f"{TEXT}.rotary_emb": "MllamaRotaryEmbedding",
    f"{TEXT}.norm": "MllamaTextRMSNorm",
    SELF: "MllamaSelfAttentionDecoderLayer",
    CROSS: "MllamaCrossAttentionDecoderLayer",
    f"{CROSS}.cross_attn.q_norm": "MllamaTextRMSNorm",
    LOCAL: "MllamaVisionEncoderLayer",
    GLOBAL: "MllamaVisionEncoderLayer",
}
ATTRIBUTES = {
    f"{TEXT}.norm.variance_epsilon": 1e-5,
    f"{SELF}.input_layernorm.variance_epsilon": 1e-5,
    f"{CROSS}.cross_attn.k_norm.variance_epsilon": 1e-5,
    f"{LOCAL}.self_attn.num_heads": 2,
    f"{LOCAL}.self_attn.head_dim": 16,
    f"{LOCAL}.self_attn.scaling": 1 / 4,
    f"{LOCAL}.is_gated": False,
    f"{GLOBAL}.is_gated": True,
    f"{VISION}.num_patches": 10,
    "device": torch.device("cpu"),
}
FORWARD = ("input_ids", "attention_mask", "cross_attention_mask", "use_cache", CACHE)
KEYWORDS = {
    "": (*FORWARD, "cross_attention_states", "position_ids", "logits_to_keep"),
    VISION: ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
    SELF: ("attention_mask", "position_embeddings"),
    CROSS: (
        "cross_attention_states",
        "cross_attention_mask",
        "attention_mask",
        "full_text_row_masked_out_mask",
    ),
    f"{VISION}.transformer": ("hidden_states",),
    LOCAL: ("attention_mask",),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MllamaConfig:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, GEOMETRY)
    return MllamaConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(config: MllamaConfig) -> Any:
    """As transformers makes it, without trimserve."""
    return MllamaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_there_in_its_shape(model: Any, config: MllamaConfig, name: str) -> None:
    vocabulary: int = config.get_text_config().vocab_size
    sizes = SIZES | {"V": vocabulary, "rows": vocabulary + 8}
    expected = [sizes[letter] for letter in PARAMETERS[name].split()]
    assert list(dict(model.named_parameters())[name].shape) == expected


def test_there_is_no_parameter_that_trimserve_does_not_know(model: Any) -> None:
    of_layer = re.compile(r"layers\.\d+\.")
    known = {of_layer.sub("layers.", name) for name in PARAMETERS}
    assert {of_layer.sub("layers.", name) for name, _ in model.named_parameters()} == known


@pytest.mark.parametrize("path", CLASSES)
def test_a_module_is_of_its_class(model: Any, path: str) -> None:
    assert type(model.get_submodule(path)) is getattr(modeling_mllama, CLASSES[path])


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_an_attribute_has_its_value(model: Any, path: str) -> None:
    assert attrgetter(path)(model) == ATTRIBUTES[path]


@pytest.mark.parametrize(("path", "keyword"), [(path, each) for path, names in KEYWORDS.items() for each in names])
def test_a_forward_pass_takes_a_keyword(model: Any, path: str, keyword: str) -> None:
    assert keyword in signature(model.get_submodule(path).forward).parameters


def test_the_model_is_built_on_the_meta_device_in_a_dtype(config: MllamaConfig, model: Any) -> None:
    built = meta_model(config, torch.bfloat16)
    assert {(tensor.is_meta, tensor.dtype) for tensor in built.parameters()} == {(True, torch.bfloat16)}
    assert {*dict(built.named_parameters())} == {*dict(model.named_parameters())}
    assert built.num_parameters() == sum(tensor.numel() for tensor in model.parameters())


def test_only_angles_have_to_be_computed_beside_the_parameters(config: MllamaConfig) -> None:
    built = meta_model(config, torch.bfloat16)
    compute_rotary(built, torch.device("cpu"))
    assert not [name for name, buffer in built.named_buffers() if buffer.is_meta]


def test_the_linear_layers_of_the_decoder_are_those_that_are_multiplied(config: MllamaConfig) -> None:
    model = meta_model(config, torch.float32)
    assert len([*decoder_linears(model)]) == 1 + 7 * GEOMETRY.num_layers
    assert len([*fused_linears(model)]) == 2 * GEOMETRY.num_layers + GEOMETRY.vision_layers + GEOMETRY.global_layers
    assert all(linear.bias is None for linears in fused_linears(model) for linear in linears)


def test_rotary_emb_gives_angles_of_positions_for_both_halves_of_a_head(model: Any) -> None:
    rotary = model.model.language_model.rotary_emb
    assert list(rotary.inv_freq.shape) == [GEOMETRY.head_dim // 2]
    assert rotary.attention_scaling == 1.0
    cosines, sines = rotary(torch.empty(0), torch.arange(300)[None])
    angles = torch.arange(300)[:, None] * torch.cat([rotary.inv_freq, rotary.inv_freq])
    torch.testing.assert_close(cosines, angles.cos()[None], atol=1e-4, rtol=0)
    torch.testing.assert_close(sines, angles.sin()[None], atol=1e-4, rtol=0)


def test_embed_tokens_gives_rows(model: Any) -> None:
    text = model.model.language_model
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(text.embed_tokens(ids), text.embed_tokens.weight[ids])


@pytest.mark.parametrize("norm", [f"{TEXT}.norm", f"{SELF}.input_layernorm", f"{CROSS}.post_attention_layernorm"])
def test_a_norm_of_the_decoder_is_an_rms_norm(model: Any, norm: str) -> None:
    module, rows = model.get_submodule(norm), torch.randn(3, 60)
    expected = module.weight * rows / (rows.square().mean(dim=1, keepdim=True) + module.variance_epsilon).sqrt()
    torch.testing.assert_close(module(rows), expected)


def test_patch_embedding_gives_a_column_of_each_patch(model: Any) -> None:
    patches = model.model.vision_model.patch_embedding(torch.randn(4, 3, 24, 24))
    assert patches.shape == (4, 32, 3, 3)


def test_apply_class_embedding_puts_the_class_first(model: Any) -> None:
    vision, patches = model.model.vision_model, torch.randn(4, 9, 32)
    expected = torch.cat([vision.class_embedding.expand(4, 1, -1), patches], dim=1)
    assert torch.equal(vision.apply_class_embedding(patches), expected)


@pytest.mark.parametrize(
    ("name", "patches"),
    [("pre_tile_positional_embedding", 9), ("gated_positional_embedding", 10), ("post_tile_positional_embedding", 10)],
)
def test_a_positional_embedding_is_called_with_hidden_rows_and_ratios(model: Any, name: str, patches: int) -> None:
    hidden = torch.randn(1, 4, patches, 32)
    assert getattr(model.model.vision_model, name)(hidden, torch.tensor([[1]])).shape == hidden.shape


@pytest.mark.parametrize("name", ["layernorm_pre", "layernorm_post"])
def test_a_norm_of_the_vision_encoder_takes_rows(model: Any, name: str) -> None:
    rows = getattr(model.model.vision_model, name)(torch.randn(2, 3, 32))
    torch.testing.assert_close(rows.mean(dim=-1), torch.zeros(2, 3), atol=1e-5, rtol=0)


def test_activation_fn_of_the_vision_mlp_takes_rows_of_any_width(model: Any) -> None:
    rows = torch.randn(3, 5)
    found = model.model.vision_model.transformer.layers[0].mlp.activation_fn(rows)
    torch.testing.assert_close(found, torch.nn.functional.gelu(rows))
