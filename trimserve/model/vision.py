"""From pixels to visual features, one image at a time (ADR-0007): transformers' vision weights in a loop of our own.

Two things differ from transformers' forward pass, neither from what it means. Its attention mask only blocks
padding rows from padding rows, so attention of the real rows over all rows and of the padding rows over the real rows
gives the same output and needs no mask. And the intermediate features are the
*inputs* of the layers in `intermediate_layers_indices`, as Meta trained the weights; transformers 5.23 takes the
outputs (`intermediate_features="outputs"` asks for that). Text and trimming are unknown here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from trimserve.model.adapters import Adapter, RowAdapters
from trimserve.model.attention import Run, attention
from trimserve.model.checkpoint import vision_config
from trimserve.model.interruptible import Interruptible
from trimserve.model.prepared import PreparedImage
from trimserve.model.projection import projection_of
from trimserve.model.transformers_mllama import MllamaForConditionalGeneration, VisionLayerParts, vision_parts
from trimserve.model.vision_observer import VisionObserver
from trimserve.ops.upload import upload, upload_ids
from trimserve.trimming.encoded_image import EncodedImage, Observation

__all__ = ["ImageRows", "IntermediateFeatures", "VisionEncoder", "VisionLayer", "vision_scratch_bytes"]

IntermediateFeatures = Literal["inputs", "outputs"]

_ROW_ALIGNMENT = 8  # Mllama pads the rows of each tile to a multiple of this; the padding rows take part


def vision_scratch_bytes(config: MllamaVisionConfig, features_per_tile: int, dtype: torch.dtype) -> int:
    """Most bytes that encoding one image takes for a while, beside its features.

    Args:
        config: of the vision encoder.
        features_per_tile: of the model.
        dtype: of the model.
    """
    width, num_collected = config.hidden_size, len(config.intermediate_layers_indices or [])
    # In a global layer: what was collected, the local layers' output as it was and normed, what this layer and the one
    # before got, and what attention came to, added and not; and before and after the MLP's activation.
    in_layer = (num_collected + 6) * width + max(2 * config.intermediate_size, 3 * width)
    # Then that output, normed, and the global layers'; what was collected; and both side by side for the projector.
    at_end = 3 * (num_collected + 1) * width
    rows_per_tile = features_per_tile + -features_per_tile % _ROW_ALIGNMENT
    return config.max_num_tiles * rows_per_tile * max(in_layer, at_end) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class ImageRows:
    """What the rows of an image are."""

    num_real: int
    """Rows that are not padding; they come first."""
    observer: VisionObserver
    adapters: RowAdapters | None = None
    """Alike for all rows; None is the base model."""


class VisionEncoder:
    """The vision model and the projector of one checkpoint."""

    def __init__(self, model: MllamaForConditionalGeneration, intermediate_features: IntermediateFeatures) -> None:
        """Borrow the weights of a model that `weights.load_weights` has built.

        Args:
            model: owns the weights.
            intermediate_features: take them from layer `inputs` (Meta's semantics) or `outputs` (transformers 5.23).
        """
        self._vision = vision_parts(model)
        self._local_layers = [VisionLayer(layer) for layer in self._vision.local_layers]
        self._global_layers = [VisionLayer(layer) for layer in self._vision.global_layers]
        indices = vision_config(model.config).intermediate_layers_indices or []
        # The output of layer i is the input of layer i + 1, so both choices are a list of layer inputs.
        self._collected = [i + (intermediate_features == "outputs") for i in indices]

    def encode(
        self, prepared: PreparedImage, needs: frozenset[Observation], adapter: Adapter | None
    ) -> Interruptible[EncodedImage]:
        """Visual features of one image, padding tiles left out; yields after each layer.

        Args:
            prepared: its tiles.
            needs: what is noted on the way.
            adapter: None is the base model.
        Returns:
            `cross_attention_states` of the real tiles in the model's dtype, and what was noted.
        """
        vision = self._vision
        aspect_ratio_ids = upload_ids([prepared.aspect_ratio_id], self._device)[None]
        pixel_values = upload(prepared.pixel_values.numpy(), self._device)
        tiles = self._embed(pixel_values, aspect_ratio_ids)
        image = self._rows_of(pixel_values[: prepared.num_tiles], needs, RowAdapters.alike(adapter))
        order = _real_rows_first(tiles, prepared.num_tiles, vision.num_patches)

        hidden, intermediate = yield from _run(self._local_layers, tiles.flatten(0, 2)[order], image, self._collected)
        tiles = vision.layernorm_post(hidden)[order.argsort()].view_as(tiles)
        tiles = vision.post_tile_positional_embedding(tiles, aspect_ratio_ids)
        hidden, _ = yield from _run(self._global_layers, tiles.flatten(0, 2)[order], image, [])

        between = torch.stack([rows[: image.num_real] for rows in intermediate], dim=-1).flatten(1)
        collected = torch.cat([hidden[: image.num_real], between], dim=-1)
        features = vision.projector(collected)
        if image.adapters is not None:
            image.adapters.change(features, collected, [vision.projector])
        return EncodedImage(features, vision.num_patches, len(self._local_layers), image.observer.observed())

    @property
    def _device(self) -> torch.device:
        return self._vision.projector.weight.device

    def _rows_of(self, pixel_values: Tensor, needs: frozenset[Observation], adapters: RowAdapters | None) -> ImageRows:
        """Of the real tiles, [tiles, 3, tile_size, tile_size]."""
        num_patches, num_tiles = self._vision.num_patches, len(pixel_values)
        observer = VisionObserver(needs, num_tiles, num_patches, len(self._local_layers))
        observer.sees(pixel_values)
        return ImageRows(num_tiles * num_patches, observer, adapters)

    def _embed(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Patches, class token and position embeddings, rows padded to the alignment.

        Args:
            pixel_values: [max_tiles, 3, tile_size, tile_size].
            aspect_ratio_ids: int64 [1, 1].
        Returns:
            [1, max_tiles, rows, width].
        """
        vision = self._vision
        weight = vision.patch_embedding.weight
        patches = vision.patch_embedding(pixel_values.to(weight.dtype)).flatten(2).transpose(1, 2)
        patches = vision.pre_tile_positional_embedding(patches[None], aspect_ratio_ids)[0]
        hidden = vision.apply_class_embedding(patches)[None]
        hidden = vision.layernorm_pre(vision.gated_positional_embedding(hidden, aspect_ratio_ids))
        return F.pad(hidden, (0, 0, 0, -hidden.shape[2] % _ROW_ALIGNMENT))


class VisionLayer:
    """One layer of the vision encoder."""

    def __init__(self, layer: VisionLayerParts) -> None:
        """Borrow the weights of transformers' layer, see `VisionEncoder`."""
        self._heads_shape = (3, layer.num_heads, layer.head_dim)
        self._scale = layer.scale
        self._attention_norm = layer.attention_norm
        self._qkv = projection_of(*layer.qkv)
        self._output = projection_of(layer.output)
        self._mlp_norm = layer.mlp_norm
        self._first = projection_of(layer.first)
        self._activation = layer.activation
        self._second = projection_of(layer.second)
        self._attention_gate, self._mlp_gate = _factors(layer.gates)

    def __call__(self, hidden: Tensor, image: ImageRows) -> Tensor:
        """The layer's output [R, width].

        Args:
            hidden: [R, width].
            image: whose rows these are.
        """
        adapters = image.adapters
        attended = self.attend(self._qkv(self._attention_norm(hidden), adapters), image)
        hidden = hidden.add(self._output(attended, adapters), alpha=self._attention_gate)
        between = self._activation(self._first(self._mlp_norm(hidden), adapters))
        return hidden.add(self._second(between, adapters), alpha=self._mlp_gate)

    def attend(self, qkv: Tensor, image: ImageRows) -> Tensor:
        """What an image's rows attend to.

        Args:
            qkv: [R, 3 * width], queries, keys and values.
            image: whose rows these are.
        Returns:
            [R, width]
        """
        q, k, v = qkv.unflatten(1, self._heads_shape).unbind(dim=1)
        image.observer.attends(q.transpose(0, 1), k.transpose(0, 1), self._scale)
        num_rows, real = len(qkv), image.num_real
        runs = [Run(real, 0, num_rows), Run(num_rows - real, 0, real)]
        return attention(q, k, v, runs, self._scale)[0]


def _factors(gates: tuple[Tensor, Tensor] | None) -> tuple[float, float]:
    """Of what attention and MLP add."""
    if gates is None:
        return 1, 1
    attention, mlp = gates
    return attention.tanh().item(), mlp.tanh().item()


def _real_rows_first(tiles: Tensor, num_tiles: int, num_patches: int) -> Tensor:
    """The permutation of the rows of tiles [1, max_tiles, rows, width] that puts the real ones first."""
    is_padding = torch.ones(tiles.shape[1:3], dtype=torch.bool, device=tiles.device)
    is_padding[:num_tiles, :num_patches] = False
    return is_padding.flatten().argsort(stable=True)


def _run(
    layers: Sequence[VisionLayer], hidden: Tensor, image: ImageRows, collected: Sequence[int]
) -> Interruptible[tuple[Tensor, list[Tensor]]]:
    """Run layers over rows [R, width].

    Returns:
        The last layer's output, and the inputs of the layers in `collected`; the input of the layer after the last is
        the output.
    """
    inputs = {}
    for index, layer in enumerate(layers):
        if index in collected:
            inputs[index] = hidden
        entering, hidden = hidden, layer(hidden, image)
        image.observer.passes(entering, hidden)
        yield
    inputs[len(layers)] = hidden
    return hidden, [inputs[index] for index in collected]
