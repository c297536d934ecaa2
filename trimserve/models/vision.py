"""From pixels to visual features: transformers' vision weights in a loop of our own, several images in one pass.

Two things differ from transformers' forward pass, neither from what it means. Its attention mask only blocks
padding rows from padding rows, so one unmasked attention of the real rows over all rows and one of the padding
rows over the real rows give the same output and let fused kernels run. And the intermediate features are the
*inputs* of the layers in `intermediate_layers_indices`, as Meta trained the weights; transformers 5.23 takes the
outputs (`intermediate_features="outputs"` asks for that). Text and trimming are unknown here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer

from trimserve.models.checkpoint import vision_config
from trimserve.models.encoded_image import EncodedImage, Observation
from trimserve.models.images import PreparedImage
from trimserve.models.interruptible import Interruptible
from trimserve.models.linear import linear
from trimserve.models.vision_observer import VisionObserver
from trimserve.models.weights import FUSED

__all__ = ["ImageRows", "IntermediateFeatures", "VisionEncoder", "VisionLayer"]

IntermediateFeatures = Literal["inputs", "outputs"]

_ROW_ALIGNMENT = 8  # Mllama pads the rows of each tile to a multiple of this; the padding rows take part


@dataclass(frozen=True, slots=True)
class ImageRows:
    """One image of a batch, whose images all have the same number of rows."""

    num_real: int
    """Rows that are not padding; they come first."""
    observer: VisionObserver


class VisionEncoder:
    """The vision model and the projector of one checkpoint."""

    def __init__(self, model: MllamaForConditionalGeneration, intermediate_features: IntermediateFeatures) -> None:
        """Borrow the weights of a model that `weights.load_weights` has built.

        Args:
            model: owns the weights.
            intermediate_features: take them from layer `inputs` (Meta's semantics) or `outputs` (transformers 5.23).
        """
        self._vision = model.model.vision_model
        self._projector: nn.Linear = model.model.multi_modal_projector
        self._local_layers = [VisionLayer(layer) for layer in self._vision.transformer.layers]
        self._global_layers = [VisionLayer(layer) for layer in self._vision.global_transformer.layers]
        indices = vision_config(model.config).intermediate_layers_indices or []
        # The output of layer i is the input of layer i + 1, so both choices are a list of layer inputs.
        self._collected = [i + (intermediate_features == "outputs") for i in indices]

    def encode(
        self, prepared: Sequence[PreparedImage], needs: Sequence[frozenset[Observation]]
    ) -> Interruptible[list[EncodedImage]]:
        """Visual features of several images, padding tiles left out; yields after each layer.

        Rows of all images go through the linear layers together, and each image attends to itself alone.

        Args:
            prepared: [B], at least one.
            needs: [B], what is noted of each on the way.
        Returns:
            Of each: `cross_attention_states` of the real tiles in the model's dtype, and what was noted.
        """
        vision = self._vision
        ids = torch.tensor([[image.aspect_ratio_id] for image in prepared], device=self._projector.weight.device)
        tiles = self._embed(torch.stack([image.pixel_values for image in prepared]), ids)
        images = [self._rows_of(*image) for image in zip(prepared, needs, strict=True)]
        order = _real_rows_first(tiles, [image.num_tiles for image in prepared], vision.num_patches)

        hidden, intermediate = yield from _run(self._local_layers, tiles.flatten(0, 2)[order], images, self._collected)
        tiles = vision.layernorm_post(hidden)[order.argsort()].view_as(tiles)
        tiles = vision.post_tile_positional_embedding(tiles, ids)
        hidden, _ = yield from _run(self._global_layers, tiles.flatten(0, 2)[order], images, [])

        parts = [rows.chunk(len(images)) for rows in (hidden, *intermediate)]
        encoded = []
        for image, last, *inputs in zip(images, *parts, strict=True):
            between = torch.stack([rows[: image.num_real] for rows in inputs], dim=-1).flatten(1)
            # One by one, so that each image has memory of its own.
            features = self._projector(torch.cat([last[: image.num_real], between], dim=-1))
            observed = image.observer.observed()
            encoded.append(EncodedImage(features, vision.num_patches, len(self._local_layers), observed))
        return encoded

    def _rows_of(self, image: PreparedImage, needs: frozenset[Observation]) -> ImageRows:
        num_patches = self._vision.num_patches
        observer = VisionObserver(needs, image.num_tiles, num_patches, len(self._local_layers))
        observer.sees(image.pixel_values[: image.num_tiles].to(self._projector.weight.device))
        return ImageRows(image.num_tiles * num_patches, observer)

    def _embed(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Patches, class token and position embeddings, rows padded to the alignment.

        Args:
            pixel_values: [B, max_tiles, 3, tile_size, tile_size].
            aspect_ratio_ids: int64 [B, 1].
        Returns:
            [B, max_tiles, rows, width].
        """
        vision = self._vision
        weight = vision.patch_embedding.weight
        pixels = pixel_values.to(weight.device, weight.dtype).flatten(0, 1)
        patches = vision.patch_embedding(pixels).flatten(2).transpose(1, 2).unflatten(0, pixel_values.shape[:2])
        patches = vision.pre_tile_positional_embedding(patches, aspect_ratio_ids).flatten(0, 1)
        hidden = vision.apply_class_embedding(patches).unflatten(0, pixel_values.shape[:2])
        hidden = vision.layernorm_pre(vision.gated_positional_embedding(hidden, aspect_ratio_ids))
        return F.pad(hidden, (0, 0, 0, -hidden.shape[2] % _ROW_ALIGNMENT))


class VisionLayer:
    """One layer of the vision encoder."""

    def __init__(self, layer: nn.Module) -> None:
        """Borrow the weights of transformers' layer, see `VisionEncoder`."""
        assert isinstance(layer, MllamaVisionEncoderLayer)
        attention = layer.self_attn
        self._heads_shape = (3, attention.num_heads, attention.head_dim)
        self._scale = attention.scaling
        self._attention_norm = layer.input_layernorm
        self._qkv = linear(attention, *FUSED["self_attn"])
        self._output = linear(attention, "o_proj")
        self._attention_gate = layer.gate_attn.tanh().item() if layer.is_gated else 1
        self._mlp_norm = layer.post_attention_layernorm
        self._first = linear(layer.mlp, "fc1")
        self._activation = layer.mlp.activation_fn
        self._second = linear(layer.mlp, "fc2")
        self._mlp_gate = layer.gate_ffn.tanh().item() if layer.is_gated else 1

    def __call__(self, hidden: Tensor, images: Sequence[ImageRows]) -> Tensor:
        """The layer's output [B * R, width].

        Args:
            hidden: [B * R, width], the rows of one image after another.
            images: [B].
        """
        qkv = self._qkv(self._attention_norm(hidden)).view(len(images), -1, *self._heads_shape)
        attended = [
            rows for image in zip(qkv.permute(0, 2, 3, 1, 4), images, strict=True) for rows in self._attend(*image)
        ]
        hidden = hidden.add(self._output(torch.cat(attended)), alpha=self._attention_gate)
        between = self._activation(self._first(self._mlp_norm(hidden)))
        return hidden.add(self._second(between), alpha=self._mlp_gate)

    def _attend(self, qkv: Tensor, image: ImageRows) -> tuple[Tensor, Tensor]:
        """What an image's real rows and its padding rows attend to, [rows, width]; qkv are [3, heads, R, Dh]."""
        q, k, v = qkv
        image.observer.attends(q, k, self._scale)
        real = image.num_real
        return (
            self._attend_to(q[:, :real], k, v),
            self._attend_to(q[:, real:], k[:, :real], v[:, :real]),
        )

    def _attend_to(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[heads, T, Dh] over [heads, R, Dh] -> [T, width]."""
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=self._scale)
        return attended[0].transpose(0, 1).flatten(1)


def _real_rows_first(tiles: Tensor, num_tiles: Sequence[int], num_patches: int) -> Tensor:
    """The permutation of the rows of tiles [B, max_tiles, rows, width] that puts each image's real ones first."""
    is_padding = torch.ones(tiles.shape[:3], dtype=torch.bool, device=tiles.device)
    for of_image, count in zip(is_padding, num_tiles, strict=True):
        of_image[:count, :num_patches] = False
    order = is_padding.flatten(1).argsort(dim=1, stable=True)
    return (order + order.shape[1] * torch.arange(len(order), device=order.device)[:, None]).flatten()


def _run(
    layers: Sequence[VisionLayer], hidden: Tensor, images: Sequence[ImageRows], collected: Sequence[int]
) -> Interruptible[tuple[Tensor, list[Tensor]]]:
    """Run layers over rows [B * R, width].

    Returns:
        The last layer's output, and the inputs of the layers in `collected`; the input of the layer after the last is
        the output.
    """
    inputs = {}
    for index, layer in enumerate(layers):
        if index in collected:
            inputs[index] = hidden
        hidden = layer(hidden, images)
        yield
    inputs[len(layers)] = hidden
    return hidden, [inputs[index] for index in collected]
