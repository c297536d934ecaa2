"""Weight-only quantization of a decoder: which layers hold int8 or int4 weights.

Linear layers of the decoder and the output layer are quantized. Rows that are multiplied keep their dtype, as do
embeddings, norms, gates, the vision encoder, keys and values.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.config import Quantize
from trimserve.model.int4 import GROUP, packed_columns, to_int4
from trimserve.model.int8 import to_int8
from trimserve.model.transformers_mllama import MllamaForConditionalGeneration, decoder_linears

__all__ = [
    "INT8",
    "SCALES",
    "WeightFormat",
    "int4_format",
    "is_quantized",
    "multiply_int8",
    "quantize_decoder",
    "quantized_rows",
]

SCALES = "weight_scales"
"""Name of a quantized linear layer's buffer beside its `weight`: what `ops.linear` takes as scales."""


class WeightFormat(NamedTuple):
    """How the weight of a quantized linear layer is stored."""

    dtype: torch.dtype
    """int8, or uint8 of int4."""
    scale_dtype: torch.dtype
    group: int | None
    """Inputs that share a scale of int4; None where all inputs of an output do."""

    @property
    def name(self) -> Quantize:
        """As `ModelConfig.quantize` calls it."""
        return "int4" if self.dtype == torch.uint8 else "int8"


INT8: Final = WeightFormat(torch.int8, torch.float32, None)
"""One scale for each output."""


def int4_format(scale_dtype: torch.dtype, group: int) -> WeightFormat:
    """One scale for each group of inputs of an output.

    Args:
        scale_dtype: float32, bfloat16 or float16.
        group: 32, 64 or 128 inputs.
    """
    return WeightFormat(torch.uint8, scale_dtype, group)


_FORMATS: Final[Mapping[Quantize, WeightFormat]] = {"int8": INT8, "int4": int4_format(torch.bfloat16, GROUP)}


def quantize_decoder(
    model: MllamaForConditionalGeneration, quantize: Quantize, stored: Mapping[str, WeightFormat]
) -> None:
    """Give the decoder's linear layers and the output layer weights of another dtype, and scales.

    Args:
        model: on the meta device: what is stored is still to come.
        quantize: as in `ModelConfig`.
        stored: by the layers' names, how those are stored that a checkpoint has quantized. They stay so, but where
            `quantize` says another dtype.
    """
    names = {module: name for name, module in model.named_modules()}
    wanted = _FORMATS.get(quantize)
    for linear in decoder_linears(model):
        own = stored.get(names[linear])
        kept = own if own is not None and (wanted is None or own.dtype == wanted.dtype) else wanted
        if kept is not None:
            _declare(linear, kept)


def _declare(linear: nn.Linear, stored: WeightFormat) -> None:
    outputs, inputs = linear.out_features, linear.in_features
    columns = packed_columns(inputs) if stored.dtype == torch.uint8 else inputs
    scales = (outputs,) if stored.group is None else (outputs, -(-inputs // stored.group))
    weight = torch.empty(outputs, columns, dtype=stored.dtype, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_buffer(SCALES, torch.empty(scales, dtype=stored.scale_dtype, device="meta"))


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


def multiply_int8(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Rows [R, columns] times int8 weights on a GPU, whose floats torch's own product reads.

    Args:
        rows: float32, bfloat16 or float16.
        weight: int8 [outputs, columns].
        scales: float32 [outputs].
    Returns:
        [R, outputs] of the rows' dtype.
    """
    dtype = torch.bfloat16 if rows.dtype == torch.float16 else rows.dtype  # sums of int8 weights overflow float16
    return (F.linear(rows.to(dtype), weight.to(dtype)) * scales).to(rows.dtype)
