"""What tests say of a model that is none, or hardly one; each replaces what it is about."""

from typing import Final

from trimserve.api.info import GenerationDefaults, ModelInfo

__all__ = ["SMALL"]

SMALL: Final = ModelInfo(
    model_id="fake",
    revision="0",
    dtype="float32",
    kv_dtype="float32",
    quantization="none",
    device="cpu",
    num_parameters=0,
    weight_bytes=0,
    linear_bytes=0,
    step_weight_bytes=0,
    vocab_size=257,
    image_token_id=257,
    max_model_len=64,
    max_images=4,
    num_self_attention_layers=1,
    num_cross_attention_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=8,
    intermediate_size=24,
    tile_size=28,
    patch_size=14,
    max_tiles=4,
    features_per_tile=5,
    kv_bytes_per_position=64,
    vision_scratch_bytes=0,
    default_k_ratio=0.2,
    default_merge_ratio=0.0,
    policy_details=(),
    generation_defaults=GenerationDefaults(0.0, 1.0, 0, 0.0, 1.0, 16, ()),
)
