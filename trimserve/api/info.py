"""A loaded model in plain numbers: geometry, limits and defaults. Made once by `model/loading.py`."""

from dataclasses import dataclass

__all__ = ["GenerationDefaults", "ModelInfo", "ParameterInfo", "PolicyInfo"]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values of sampling fields that a request leaves unset, from the checkpoint's `generation_config.json`."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """1 is off."""
    top_k: int
    """0 is off."""
    min_p: float
    """0 is off."""
    repetition_penalty: float
    """1 is off."""
    max_new_tokens: int
    """Also bounded by the room that the prompt leaves in the context."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A numeric parameter of a policy."""

    name: str
    default: float
    """A whole number where it is an int."""
    description: str
    low: float
    """The smallest value."""
    high: float
    """The largest value."""
    is_low_open: bool
    """Whether `low` itself is excluded."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy that chooses visual features."""

    name: str
    """Value of `trim.policy`."""
    summary: str
    """What it does, in a sentence."""
    is_before_decoder: bool
    """Whether it chooses before the decoder, from the image alone, or after the first cross-attention layer."""
    needs: tuple[str, ...]
    """Its inputs besides the features: `text`, or an `Observation` of the vision encoder."""
    budgets: tuple[str, ...]
    """Kinds of budget that it accepts."""
    parameters: tuple[ParameterInfo, ...]
    knob: str = ""
    """Knob of the model that must be set for it to be available; empty if there is none."""
    is_available: bool = True
    """Whether requests may choose it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity, geometry and limits of a loaded model."""

    model_id: str
    revision: str
    """Commit hash of a hub checkpoint, content hash of a folder."""
    dtype: str
    """Of weights that are not quantized and of what is computed: `float32`, `bfloat16` or `float16`."""
    kv_dtype: str
    """Of keys and values in pages: as `dtype`, or `int8`."""
    quantization: str
    """How the decoder's linear layers are stored, by `quantize` or as the checkpoint has them: `none` (as `dtype`),
    `int8` or `int4`."""
    device: str
    num_parameters: int
    weight_bytes: int
    """Of all parameters, as stored."""
    linear_bytes: int
    """Of the decoder's linear layers and the output layer: what tensor parallelism divides."""
    step_weight_bytes: int
    """Of what a decode step reads: all but the vision encoder, the embedding and the projections of features."""
    vocab_size: int
    """Size of the logits; the id of `<|image|>` is past it."""
    image_token_id: int
    max_model_len: int
    """Most tokens of prompt and answer together."""
    max_images: int
    """Most images of one request."""
    num_self_attention_layers: int
    num_cross_attention_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    """Width of a text layer's MLP."""
    tile_size: int
    """Side of a tile, in pixels."""
    patch_size: int
    """Side of a patch, in pixels."""
    max_tiles: int
    """Most tiles of one image."""
    features_per_tile: int
    """Patches of a tile plus its class token."""
    kv_bytes_per_position: int
    """K and V of one position in one layer, with their scales."""
    vision_scratch_bytes: int
    """Peak of temporary memory while one image is encoded, without its features."""
    default_k_ratio: float
    """Budget per head of requests that set none, in (0, 1]."""
    default_merge_ratio: float
    """`TrimRequest.merge_ratio` of requests that set none, in [0, 1]."""
    policy_details: tuple[PolicyInfo, ...]
    """All policies; the first is the default."""
    generation_defaults: GenerationDefaults
    tensor_parallel: int = 1
    """Processes that hold a part of the model each; bytes here are of all of them together."""
    guide: "ModelInfo | None" = None
    """The model that chooses visual features for this one; None if there is none."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of `policy_details`."""
        return tuple(policy.name for policy in self.policy_details)

    @property
    def cross_kv_bytes_per_feature(self) -> int:
        """K and V of one visual feature in all cross-attention layers."""
        return self.kv_bytes_per_position * self.num_cross_attention_layers

    @property
    def self_kv_bytes_per_token(self) -> int:
        """K and V of one text token in all self-attention layers."""
        return self.kv_bytes_per_position * self.num_self_attention_layers
