"""Weight-only quantization of a decoder: which layers hold int8 or int4 weights, and what multiplies with them.

Linear layers of the decoder and the output layer are quantized. Rows that are multiplied keep their dtype, as do
embeddings, norms, gates, the vision encoder, keys and values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.config import Quantize
from trimserve.model.int4 import GROUP, packed_columns, to_int4, unpack_int4
from trimserve.model.int8 import to_int8
from trimserve.model.transformers_mllama import MllamaForConditionalGeneration, decoder_linears

__all__ = ["SCALES", "is_quantized", "multiply_many", "quantize_decoder", "quantized_rows"]

SCALES = "weight_scales"
"""Name of a quantized linear layer's buffer beside its `weight`: what `ops.linear` takes as scales."""

_SLICE_WEIGHTS = 1 << 20
"""That are numbers of the rows' dtype at once where there are many rows."""


def quantize_decoder(model: MllamaForConditionalGeneration, quantize: Quantize) -> None:
    """Give the decoder's linear layers and the output layer weights of another dtype, and scales.

    Args:
        model: on the meta device: what is stored is still to come.
        quantize: as in `ModelConfig`.
    """
    for linear in decoder_linears(model):
        if quantize == "int8":
            _declare(linear, torch.int8, linear.in_features, torch.empty(linear.out_features, device="meta"))
        elif quantize == "int4":
            shape = (linear.out_features, -(-linear.in_features // GROUP))
            scales = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            _declare(linear, torch.uint8, packed_columns(linear.in_features), scales)


def _declare(linear: nn.Linear, dtype: torch.dtype, columns: int, scales: Tensor) -> None:
    weight = torch.empty(linear.out_features, columns, dtype=dtype, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_buffer(SCALES, scales)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight comes with scales."""
    return not weight.is_floating_point()


def quantized_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize weights, [R, columns] of any float dtype.

    Args:
        rows: the weights.
        dtype: of the result: int8, or uint8 for int4.
    Returns:
        What `to_int8` or `to_int4` says.
    """
    return to_int4(rows) if dtype == torch.uint8 else to_int8(rows)


def multiply_many(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Rows [R, columns] times quantized weights, for many rows: slices of the weights are made floats first.

    Args:
        rows: float32, bfloat16 or float16.
        weight: int8 or int4, as `ops.linear` takes it.
        scales: of the weights.
    Returns:
        [R, outputs] of the rows' dtype.
    """
    dtype = torch.bfloat16 if rows.dtype == torch.float16 else rows.dtype  # sums of int8 weights overflow float16
    given, num_columns = rows.to(dtype), rows.shape[1]
    product = rows.new_empty(len(rows), len(weight))
    num_outputs = max(1, _SLICE_WEIGHTS // max(1, num_columns))
    for start in range(0, len(weight), num_outputs):
        part = slice(start, start + num_outputs)
        if weight.dtype == torch.uint8:
            product[:, part] = F.linear(given, unpack_int4(weight[part], scales[part], num_columns).to(dtype))
        else:
            product[:, part] = F.linear(given, weight[part].to(dtype)) * scales[part]
    return product
