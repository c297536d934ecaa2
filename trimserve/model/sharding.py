"""Which part of a model's weights a rank holds.

A layer's query, key, value, gate and up projections are cut by rows, so that a rank has whole heads and a part of the
MLP; what multiplies their outputs is cut by columns, so that the ranks' products add up. The output layer is cut by
rows. Embeddings, norms, the vision encoder and the projector are whole on every rank.
"""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import torch
from torch import nn

from trimserve.api.info import ModelInfo
from trimserve.config import ModelConfig
from trimserve.errors import CheckpointError
from trimserve.model.ranks import Shard
from trimserve.model.transformers_mllama import MllamaForConditionalGeneration, SelfLayerParts, decoder_parts

__all__ = ["WHOLE", "Share", "check_shares", "shard_decoder", "shares"]

_ALL: Final = slice(None)


class Share(NamedTuple):
    """The part of a weight [outputs, inputs]."""

    rows: slice = _ALL
    columns: slice = _ALL


WHOLE: Final = Share()


def shares(model: MllamaForConditionalGeneration, shard: Shard) -> Mapping[str, Share]:
    """What a rank holds of the linear layers that are cut, by the layers' names.

    Args:
        model: of which nothing is cut yet.
        shard: of the rank.
    """
    if shard.size == 1:
        return {}
    names = {module: name for name, module in model.named_modules()}
    return {names[linear]: share for linear, share in _shares(model, shard)}


def shard_decoder(model: MllamaForConditionalGeneration, shard: Shard) -> None:
    """Leave a rank's part of the weights of a model on the meta device."""
    if shard.size == 1:
        return
    for linear, share in [*_shares(model, shard)]:
        weight = linear.weight[share]
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)


def check_shares(config: ModelConfig, info: ModelInfo) -> None:
    """Check that a model can be cut, and that nothing is asked for that does not work then.

    Args:
        config: how it is read.
        info: of the model.
    Raises:
        CheckpointError: it cannot.
    """
    size = info.tensor_parallel
    if size == 1:
        return
    for count, things in (info.num_kv_heads, "KV heads"), (info.intermediate_size, "columns of the MLP"):
        if count % size:
            raise CheckpointError(f"tensor_parallel must divide the {count} {things} of {info.model_id}, got {size}")
    if info.quantization == "int4":
        raise CheckpointError("tensor_parallel does not work with int4 weights, whose groups may not be cut")
    if config.adapter:
        raise CheckpointError("tensor_parallel does not work with adapters (adapter)")


def _shares(model: MllamaForConditionalGeneration, shard: Shard) -> Iterator[tuple[nn.Linear, Share]]:
    parts = decoder_parts(model)
    for layer in parts.layers:
        projections = layer.qkv if isinstance(layer, SelfLayerParts) else (layer.query, *layer.kv)
        for linear in (*projections, *layer.gate_up):
            yield linear, Share(rows=shard.even(linear.out_features))
        for linear in (layer.output, layer.down):
            yield linear, Share(columns=shard.even(linear.in_features))
    yield parts.lm_head, Share(rows=shard.equal(parts.lm_head.out_features))
