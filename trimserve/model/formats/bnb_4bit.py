"""bitsandbytes' 4 bits, NF4 and FP4: numbers of a table of 16, a largest magnitude for each block of a flat weight.

Two numbers share a byte, the first in its upper half; the bytes may be stored as another dtype
(`bnb_4bit_quant_storage`). Nested magnitudes are quantized again, to 8 bits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.errors import CheckpointError
from trimserve.model.formats.quantized_linear import LinearParts
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["Bnb4Bit"]

_STATE = "weight.quant_state.bitsandbytes__"
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Bnb4Bit:
    """See `QuantizedLinear`."""

    weight: StoredTensor
    """[units, 1], of two numbers a byte."""
    state: Mapping[str, Any]
    table: StoredTensor
    """float32 [16]"""
    absmax: StoredTensor
    """[blocks], uint8 if nested."""
    nested: tuple[StoredTensor, StoredTensor] | None
    """Table float32 [256] and magnitudes [nested blocks]."""
    shape: tuple[int, int]
    row_multiple: int = 1

    @classmethod
    def find(cls, parts: LinearParts) -> "Bnb4Bit | None":
        """The layer, if it is stored in this format.

        Raises:
            CheckpointError: a part that is missing or does not fit.
        """
        if not any(part.startswith("weight.") for part in parts):
            return None
        outputs, inputs = parts.shape
        num_bytes = ceil(outputs * inputs / 2)
        shapes = {(num_bytes // size, 1) for size in set(_STORAGE.values()) if num_bytes % size == 0}
        weight = parts.get("weight", (*_STORAGE,), *sorted(shapes, reverse=True))
        if weight.shape[0] * _STORAGE[weight.dtype] != num_bytes:
            raise CheckpointError(f"{weight} must have {num_bytes} bytes, got {weight.dtype} {list(weight.shape)}")
        state = _state(parts)
        num_blocks = ceil(outputs * inputs / state["blocksize"])
        is_nested = "nested_blocksize" in state
        absmax = parts.get("weight.absmax", ("U8",) if is_nested else ("F32",), (num_blocks,))
        nested = None
        if is_nested:
            num_nested = ceil(num_blocks / state["nested_blocksize"])
            nested = (
                parts.get("weight.nested_quant_map", ("F32",), (256,)),
                parts.get("weight.nested_absmax", ("F32",), (num_nested,)),
            )
        table = parts.get("weight.quant_map", ("F32",), (16,))
        return cls(weight, state, table, absmax, nested, parts.shape)

    def floats(self, rows: slice) -> Tensor:
        """See `QuantizedLinear`."""
        _, inputs = self.shape
        block = self.state["blocksize"]
        first, end = rows.start * inputs, rows.stop * inputs  # in the flat weight
        blocks = slice(first // block, ceil(end / block))
        num_of_unit = 2 * _STORAGE[self.weight.dtype]  # divides a block
        units = slice(blocks.start * block // num_of_unit, blocks.stop * block // num_of_unit)
        codes = self.weight.read(units).view(torch.uint8).flatten().int()
        numbers = self._pairs.index_select(0, codes).view(torch.float32)
        if len(numbers) % block:  # the last block is short
            numbers = F.pad(numbers, (0, -len(numbers) % block))
        floats = numbers.view(-1, block).mul_(self._magnitudes[blocks, None]).flatten()
        skipped = blocks.start * block
        dtype: torch.dtype = getattr(torch, self.state["dtype"])
        return floats[first - skipped : end - skipped].view(-1, inputs).to(dtype)

    @cached_property
    def _pairs(self) -> Tensor:
        """The two numbers of each byte as one of 64 bits, [256], which is looked up several times as fast."""
        table, bytes_ = self.table.read(), torch.arange(256)
        return torch.stack((table[bytes_ >> 4], table[bytes_ & 0xF]), dim=1).view(torch.int64).flatten()

    @cached_property
    def _magnitudes(self) -> Tensor:
        """Of each block, float32."""
        if self.nested is None:
            return self.absmax.read()
        table, magnitudes = (tensor.read() for tensor in self.nested)
        codes = self.absmax.read().int()
        of_blocks = magnitudes.repeat_interleave(self.state["nested_blocksize"])[: len(codes)]
        return table[codes] * of_blocks + torch.tensor(float(self.state["nested_offset"]))


def _state(parts: LinearParts) -> Mapping[str, Any]:
    """The settings that bitsandbytes stores as JSON in bytes, checked."""
    name = next((part for part in parts if part.startswith(_STATE)), f"{_STATE}nf4")
    tensor = parts.get(name, ("U8",))
    try:
        state = json.loads(bytes(tensor.read().tolist()))
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested_block, _ = state.get("nested_blocksize", 256), float(state.get("nested_offset", 0))
        dtype, are_blocks = state["dtype"], all(size > 0 and size % 8 == 0 for size in (block, nested_block))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensor}: not a state of bitsandbytes: {type(error).__name__}: {error}") from error
    if shape != parts.shape:
        raise CheckpointError(f"{tensor}: shape must be {list(parts.shape)}, got {list(shape)}")
    if not are_blocks or dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"{tensor}: blocksize {block} and dtype {dtype} are none of bitsandbytes'")
    return dict(state)
