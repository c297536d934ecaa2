"""From pixels to visual features: transformers' vision layers run in a loop of our own.

Two things differ from transformers' forward pass, neither from what it means. Its attention mask only blocks
padding rows from padding rows, so one unmasked attention of the real rows over all rows and one of the padding
rows over the real rows give the same output and let fused kernels run. And the intermediate features are the
*inputs* of the layers in `intermediate_layers_indices`, as Meta trained the weights; transformers 5.23 takes the
outputs (`intermediate_features="outputs"` asks for that). Text and trimming are unknown here.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer

from trimserve.models.checkpoint import vision_config
from trimserve.models.encoded_image import EncodedImage, Observation
from trimserve.models.interruptible import Interruptible
from trimserve.models.vision_observer import VisionObserver

__all__ = ["IntermediateFeatures", "VisionEncoder"]

IntermediateFeatures = Literal["inputs", "outputs"]

_ROW_ALIGNMENT = 8  # Mllama pads the rows of each tile to a multiple of this; the padding rows take part


class VisionEncoder:
    """The vision model and the projector of one checkpoint."""

    def __init__(self, model: MllamaForConditionalGeneration, intermediate_features: IntermediateFeatures) -> None:
        """Borrow the weights of a transformers model.

        Args:
            model: owns the weights.
            intermediate_features: take them from layer `inputs` (Meta's semantics) or `outputs` (transformers 5.23).
        """
        self._vision = model.model.vision_model
        self._projector: nn.Linear = model.model.multi_modal_projector
        indices = vision_config(model.config).intermediate_layers_indices or []
        # The output of layer i is the input of layer i + 1, so both choices are a list of layer inputs.
        self._collected = [i + (intermediate_features == "outputs") for i in indices]

    def encode(
        self,
        pixel_values: Tensor,
        aspect_ratio_id: int,
        num_tiles: int,
        needs: frozenset[Observation] = frozenset(),
    ) -> Interruptible[EncodedImage]:
        """Visual features of one image, padding tiles left out; yields after each layer.

        Args:
            pixel_values: [max_tiles, 3, tile_size, tile_size], any float dtype; padding tiles are zero.
            aspect_ratio_id: 1-based index into `supported_aspect_ratios`.
            num_tiles: real tiles, in [1, max_tiles]; they come first.
            needs: what is noted on the way.
        Returns:
            `cross_attention_states` of the real tiles in the model's dtype, and what was noted.
        """
        vision = self._vision
        ids = torch.tensor([[aspect_ratio_id]], device=self._projector.weight.device)
        hidden = self._embed(pixel_values, ids)  # [max_tiles, rows, width]
        max_tiles, num_rows, width = hidden.shape
        real, order = _real_rows_first(max_tiles, num_rows, num_tiles, vision.num_patches, hidden.device)
        restore = order.argsort()
        local_layers = vision.transformer.layers
        observer = VisionObserver(needs, num_tiles, vision.num_patches, len(local_layers))
        observer.sees(pixel_values[:num_tiles].to(hidden.device))

        hidden, intermediate = yield from self._encode(
            local_layers, hidden.view(-1, width)[order], real, self._collected, observer
        )
        hidden = vision.layernorm_post(hidden)
        tiles = hidden[restore].view(1, max_tiles, num_rows, width)
        tiles = vision.post_tile_positional_embedding(tiles, ids)
        hidden, _ = yield from self._encode(
            vision.global_transformer.layers, tiles.view(-1, width)[order], real, [], observer
        )

        features = torch.cat([hidden[:real], torch.stack(intermediate, dim=-1).flatten(1)], dim=-1)
        return EncodedImage(self._projector(features), vision.num_patches, len(local_layers), observer.observed())

    def _embed(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Patches, class token and position embeddings, rows padded to the alignment: [max_tiles, rows, width]."""
        vision = self._vision
        weight = vision.patch_embedding.weight
        patches = vision.patch_embedding(pixel_values.to(weight.device, weight.dtype)).flatten(2).transpose(1, 2)
        patches = vision.pre_tile_positional_embedding(patches[None], aspect_ratio_ids)[0]
        hidden = vision.apply_class_embedding(patches)
        hidden = vision.gated_positional_embedding(hidden[None], aspect_ratio_ids)[0]
        hidden = vision.layernorm_pre(hidden)
        return F.pad(hidden, (0, 0, 0, -hidden.shape[1] % _ROW_ALIGNMENT))

    @staticmethod
    def _encode(
        layers: nn.ModuleList, hidden: Tensor, real: int, collected: Sequence[int], observer: VisionObserver
    ) -> Interruptible[tuple[Tensor, list[Tensor]]]:
        """Run encoder layers over rows [R, width] of which the first `real` are real.

        Returns:
            The last layer's output, and the real rows of the inputs of the layers in `collected`; the input of
            the layer after the last is the output.
        """
        inputs = {}
        for index, layer in enumerate(layers):
            if index in collected:
                inputs[index] = hidden[:real]
            hidden = _encoder_layer(layer, hidden, real, observer)
            yield
        inputs[len(layers)] = hidden[:real]
        return hidden, [inputs[index] for index in collected]


def _real_rows_first(
    max_tiles: int, num_rows: int, num_tiles: int, num_patches: int, device: torch.device
) -> tuple[int, Tensor]:
    """Number of real rows, and the permutation of all rows that puts them first (stable)."""
    is_padding = torch.ones(max_tiles, num_rows, dtype=torch.bool, device=device)
    is_padding[:num_tiles, :num_patches] = False
    return num_tiles * num_patches, is_padding.flatten().argsort(stable=True)


def _encoder_layer(layer: nn.Module, hidden: Tensor, real: int, observer: VisionObserver) -> Tensor:
    assert isinstance(layer, MllamaVisionEncoderLayer)
    attention = _attend(layer, layer.input_layernorm(hidden), real, observer)
    if layer.is_gated:
        attention = layer.gate_attn.tanh() * attention
    hidden = hidden + attention
    mlp: Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
    if layer.is_gated:
        mlp = layer.gate_ffn.tanh() * mlp
    return hidden + mlp


def _attend(layer: MllamaVisionEncoderLayer, hidden: Tensor, real: int, observer: VisionObserver) -> Tensor:
    module = layer.self_attn
    q, k, v = (
        projection(hidden).view(1, -1, module.num_heads, module.head_dim).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    observer.attends(q[0], k[0], module.scaling)
    seen = F.scaled_dot_product_attention(q[:, :, :real], k, v, scale=module.scaling)
    padding = F.scaled_dot_product_attention(q[:, :, real:], k[:, :, :real], v[:, :, :real], scale=module.scaling)
    attended = torch.cat([seen, padding], dim=2).transpose(1, 2).flatten(2)[0]
    output: Tensor = module.o_proj(attended)
    return output
