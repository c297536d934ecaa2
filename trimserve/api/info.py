"""What a loaded model is, in plain numbers: geometry, limits and defaults.

Made once by `loading.py`, read by every layer above. It knows no tensor.
"""

from dataclasses import dataclass

__all__ = ["GenerationDefaults", "ModelInfo", "ParameterInfo", "PolicyInfo"]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What unset sampling fields of a request mean: the checkpoint's `generation_config.json`."""

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
    """Tokens; further bounded by the room that the prompt leaves in the context."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end generation."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A number that a request may set for a policy."""

    name: str
    default: float
    """A whole number where it is an int."""
    description: str
    low: float
    """The least value."""
    high: float
    """The largest value."""
    is_low_open: bool
    """Whether `low` itself is out of range."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """One way of choosing visual features."""

    name: str
    """What `trim.policy` calls it."""
    summary: str
    """What it does, in a sentence."""
    is_before_decoder: bool
    """Whether it is asked before the decoder, from the image alone; otherwise after the first cross-attention layer."""
    needs: tuple[str, ...]
    """What it looks at beside the features: `text`, or an `Observation` of the vision encoder."""
    budgets: tuple[str, ...]
    """Kinds of budget that it takes."""
    parameters: tuple[ParameterInfo, ...]
    knob: str = ""
    """Knob of the model that has to be set before it can be asked; empty: none."""
    is_available: bool = True
    """Whether that is so."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity, geometry and limits of a loaded model."""

    model_id: str
    revision: str
    """Commit hash of a hub checkpoint, content hash of a folder."""
    dtype: str
    """Of KV and of weights that are not quantized: `float32`, `bfloat16` or `float16`."""
    quantization: str
    """`none`, or `int8` where the decoder's linear layers are stored so."""
    device: str
    num_parameters: int
    weight_bytes: int
    """Of all parameters, as they are stored."""
    vocab_size: int
    """Rows of the logits; the id of `<|image|>` lies past it."""
    image_token_id: int
    max_model_len: int
    """Prompt and generated tokens together."""
    max_images: int
    """Images of one request."""
    num_self_attention_layers: int
    num_cross_attention_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    tile_size: int
    """Pixels along the side of one tile."""
    patch_size: int
    """Pixels along the side of one patch."""
    max_tiles: int
    """Tiles of one image."""
    features_per_tile: int
    """Patches of a tile and its class token."""
    kv_bytes_per_position: int
    """Bytes of K and V that one position of one layer takes."""
    vision_scratch_bytes: int
    """Most bytes that encoding one image takes for a while, beside its features."""
    default_k_ratio: float
    """Budget per head of a request that names none, in (0, 1]."""
    default_merge_ratio: float
    """`TrimRequest.merge_ratio` of a request that names none, in [0, 1]."""
    policy_details: tuple[PolicyInfo, ...]
    """What `trim.policy` takes; the first is the default."""
    generation_defaults: GenerationDefaults
    guide: "ModelInfo | None" = None
    """The model that chooses visual features for this one; None: there is none."""

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of `policy_details`."""
        return tuple(policy.name for policy in self.policy_details)

    @property
    def cross_kv_bytes_per_feature(self) -> int:
        """Bytes of K and V that one visual feature takes over all cross-attention layers."""
        return self.kv_bytes_per_position * self.num_cross_attention_layers

    @property
    def self_kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one text token takes over all self-attention layers."""
        return self.kv_bytes_per_position * self.num_self_attention_layers
