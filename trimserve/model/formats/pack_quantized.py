"""compressed-tensors' `pack-quantized`: numbers of 4 or 8 bits packed into int32, a scale for each group of inputs.

Checkpoints named W4A16 and W8A16. Number i of a row lies in bits [i * b, i * b + b) of the row's words, raised by half
its range. Zero points, where there are some, are raised and packed in the same way along the outputs.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.formats.packed import INT4_GROUPS, INT4_ZERO, scaled, unpack
from trimserve.model.formats.quantized_linear import FLOATS, LinearParts
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["PackInt4", "PackQuantized"]


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """See `QuantizedLinear`."""

    packed: StoredTensor
    """int32 [outputs, words]"""
    scale: StoredTensor
    """[outputs, groups]"""
    zero_point: StoredTensor | None
    """int32 [words, groups]"""
    group: StoredTensor | None
    """Of each input; None if groups are runs of equal length."""
    num_inputs: int
    num_bits: int

    @classmethod
    def find(cls, parts: LinearParts) -> "PackQuantized | None":
        """The layer, if it is stored in this format.

        Raises:
            CheckpointError: a part that is missing or does not fit.
        """
        if "weight_packed" not in parts:
            return None
        outputs, inputs = parts.shape
        words = {ceil(inputs * num_bits / 32): num_bits for num_bits in (4, 8)}
        packed = parts.get("weight_packed", ("I32",), *((outputs, num_words) for num_words in words))
        num_bits = words[packed.shape[1]]
        scale = parts.get("weight_scale", FLOATS)
        num_groups = scale.shape[-1] if scale.shape else 0
        parts.get("weight_scale", FLOATS, (outputs, num_groups))
        group = parts.groups("weight_g_idx", scale, num_groups)
        _check_shape(parts)
        packed_outputs = ceil(outputs * num_bits / 32)
        zero_point = parts.find("weight_zero_point", ("I32",), (packed_outputs, num_groups))
        is_int4 = num_bits == 4 and zero_point is None and group is None and inputs / num_groups in INT4_GROUPS
        return (PackInt4 if is_int4 else cls)(packed, scale, zero_point, group, inputs, num_bits)

    @property
    def row_multiple(self) -> int:
        """See `QuantizedLinear`."""
        return 32 // self.num_bits  # a word of zero points

    def floats(self, rows: slice) -> Tensor:
        """See `QuantizedLinear`."""
        numbers = unpack(self.packed.read(rows), self.num_bits)[:, : self.num_inputs]
        zero_points = torch.tensor(1 << (self.num_bits - 1), dtype=torch.int16)
        if self.zero_point is not None:
            words = slice(rows.start // self.row_multiple, ceil(rows.stop / self.row_multiple))
            zero_points = unpack(self.zero_point.read(words).T, self.num_bits)[:, : len(numbers)].T
        group = None if self.group is None else self.group.read().long()
        return scaled(numbers, zero_points, self.scale.read(rows), group)


class PackInt4(PackQuantized):
    """See `Int4Linear`."""

    __slots__ = ()

    @property
    def group_size(self) -> int:
        """See `Int4Linear`."""
        return self.num_inputs // self.scale.shape[1]

    @property
    def scale_dtype(self) -> torch.dtype:
        """See `Int4Linear`."""
        return FLOATS[self.scale.dtype]

    def int4(self, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Int4Linear`."""
        numbers = unpack(self.packed.read(rows), self.num_bits)[:, : self.num_inputs]
        return numbers - INT4_ZERO, self.scale.read(rows)


def _check_shape(parts: LinearParts) -> None:
    shape = parts.find("weight_shape", ("I32", "I64"), (2,))
    if shape is not None and tuple(shape.read().tolist()) != parts.shape:
        raise CheckpointError(f"{shape} must be {list(parts.shape)}, got {shape.read().tolist()}")
