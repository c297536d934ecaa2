"""GPTQ's layout, which AutoRound writes too: numbers of 4 or 8 bits packed along the inputs, in groups of inputs.

Number i of an output lies in bits of word i * b // 32; zero points are packed along the outputs. GPTQ's first version,
which is still what most write, stores zero points less one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.formats.packed import INT4_GROUPS, INT4_ZERO, scaled, unpack
from trimserve.model.formats.quantized_linear import FLOATS, LinearParts
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["Gptq", "GptqInt4"]

_ZERO_OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}
"""What stored zero points lack, by version."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """See `QuantizedLinear`."""

    weight: StoredTensor
    """int32 [words, outputs]"""
    zero_point: StoredTensor
    """int32 [groups, words]"""
    scale: StoredTensor
    """[groups, outputs]"""
    group: StoredTensor | None
    """int32 [inputs], the group of each; None if groups are runs of equal length."""
    num_bits: int
    zero_offset: int
    """What stored zero points lack."""

    @classmethod
    def find(cls, parts: LinearParts, config: Mapping[str, Any]) -> "Gptq | None":
        """The layer, if it is stored in this format.

        Args:
            parts: of the layer.
            config: `quantization_config`, which alone tells what zero points lack.
        Raises:
            CheckpointError: a part that is missing or does not fit.
        """
        if "qweight" not in parts:
            return None
        outputs, inputs = parts.shape
        words = {inputs * num_bits // 32: num_bits for num_bits in (4, 8)}
        weight = parts.get("qweight", ("I32",), *((num_words, outputs) for num_words in words))
        num_bits = words[weight.shape[0]]
        scale = parts.get("scales", FLOATS)
        num_groups = scale.shape[0] if scale.shape else 0
        parts.get("scales", FLOATS, (num_groups, outputs))
        group = parts.groups("g_idx", scale, num_groups)
        zero_point = parts.get("qzeros", ("I32",), (num_groups, outputs * num_bits // 32))
        layer = cls(weight, zero_point, scale, group, num_bits, _zero_offset(weight, config))
        may_be_int4 = num_bits == 4 and group is None and inputs / num_groups in INT4_GROUPS
        is_int4 = may_be_int4 and bool((layer.zero_points(slice(None)) == INT4_ZERO).all())
        return GptqInt4(weight, zero_point, scale, group, num_bits, layer.zero_offset) if is_int4 else layer

    @property
    def row_multiple(self) -> int:
        """See `QuantizedLinear`."""
        return 32 // self.num_bits  # a word of zero points

    def floats(self, rows: slice) -> Tensor:
        """See `QuantizedLinear`."""
        words = slice(rows.start // self.row_multiple, rows.stop // self.row_multiple)
        numbers = unpack(self.weight.read(slice(None), rows).T, self.num_bits)
        group = None if self.group is None else self.group.read().long()
        return scaled(numbers, self.zero_points(words), self.scale.read(slice(None), rows).T, group)

    def zero_points(self, words: slice) -> Tensor:
        """What numbers are raised by, int16 [outputs, groups].

        Args:
            words: of packed outputs.
        """
        return unpack(self.zero_point.read(slice(None), words), self.num_bits).T + self.zero_offset


class GptqInt4(Gptq):
    """See `Int4Linear`."""

    __slots__ = ()

    @property
    def group_size(self) -> int:
        """See `Int4Linear`."""
        return self.weight.shape[0] * self.row_multiple // self.scale.shape[0]

    @property
    def scale_dtype(self) -> torch.dtype:
        """See `Int4Linear`."""
        return FLOATS[self.scale.dtype]

    def int4(self, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Int4Linear`."""
        numbers = unpack(self.weight.read(slice(None), rows).T, self.num_bits)
        return numbers - INT4_ZERO, self.scale.read(slice(None), rows).T


def _zero_offset(weight: StoredTensor, config: Mapping[str, Any]) -> int:
    if config.get("quant_method") == "auto-round":
        return 1 if config.get("packing_format") == "auto_round:auto_gptq" else 0
    version = config.get("checkpoint_format") or config.get("format") or "gptq"  # as transformers looks for it
    offset = _ZERO_OFFSETS.get(str(version).lower())
    if offset is None:
        known = " or ".join(_ZERO_OFFSETS)
        raise CheckpointError(f"{weight}: format of quantization_config must be {known}, got {version}")
    return offset
