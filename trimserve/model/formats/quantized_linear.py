"""What a format answers about one linear layer: its weight in floats, slice by slice, or as it is stored."""

from collections.abc import Collection, Iterator, Mapping
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["FLOATS", "Int4Linear", "Int8Linear", "LinearParts", "QuantizedLinear"]

FLOATS: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that scales may have, by what safetensors calls them."""


class QuantizedLinear(Protocol):
    """The weight [outputs, inputs] of one linear layer; nothing is read before it is asked for."""

    @property
    def row_multiple(self) -> int:
        """Slices of rows must begin at multiples of this."""

    def floats(self, rows: slice) -> Tensor:
        """Rows of the weight [R, inputs], bit-equal to what the format's own library makes of them.

        The dtype is that of the library too: what the checkpoint was quantized from, or that of its scales.
        """


@runtime_checkable
class Int8Linear(QuantizedLinear, Protocol):
    """One whose numbers are multiplied as they are stored."""

    def int8(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The same rows as int8 [R, inputs] and float32 scales [R]."""


@runtime_checkable
class Int4Linear(QuantizedLinear, Protocol):
    """The same of numbers of 4 bits, without zero points, in groups of 32, 64 or 128 inputs."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """One of `FLOATS`."""

    def int4(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The same rows as int16 [R, inputs] in [-8, 7], and scales [R, groups]."""


class LinearParts:
    """The stored tensors of one linear layer, by what follows its name, such as `weight` or `weight.absmax`."""

    def __init__(self, name: str, shape: tuple[int, int], tensors: Mapping[str, StoredTensor]) -> None:
        """Collect them.

        Args:
            name: of the layer.
            shape: [outputs, inputs]
            tensors: of a linear layer.
        """
        self.name = name
        self.shape = shape
        self.used: set[str] = set()
        """The parts that were asked for."""
        self._tensors = tensors

    def __contains__(self, part: str) -> bool:
        """Whether there is such a part."""
        return part in self._tensors

    def __iter__(self) -> Iterator[str]:
        """The parts."""
        return iter(self._tensors)

    def get(self, part: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> StoredTensor:
        """A part of the layer.

        Args:
            part: which.
            dtypes: that it may have.
            shapes: that it may have; none for any.
        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        self.used.add(part)
        tensor = self._tensors.get(part)
        if tensor is None:
            beside = next(iter(self._tensors.values()))
            raise CheckpointError(f"{beside}: {self.name}.{part} is missing")
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{tensor} must be {' or '.join(dtypes)}, got {tensor.dtype}")
        if shapes and tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"{tensor} must be {expected}, got {list(tensor.shape)}")
        return tensor

    def find(self, part: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> StoredTensor | None:
        """The same of a part that may be missing."""
        return self.get(part, dtypes, *shapes) if part in self else None

    def groups(self, part: str, scale: StoredTensor, num_groups: int) -> StoredTensor | None:
        """The part that tells the group of each input; None if there is none, or groups are runs of equal length.

        Args:
            part: which.
            scale: of the groups.
            num_groups: that it has.
        Raises:
            CheckpointError: as `get`, a group that the scales lack, or inputs that cannot be cut into equal runs.
        """
        _, inputs = self.shape
        can_be_runs = num_groups > 0 and inputs % num_groups == 0
        groups = self.find(part, ("I32", "I64"), (inputs,))
        if groups is not None:
            of_inputs = groups.read()
            low, high = of_inputs.aminmax()
            if can_be_runs and torch.equal(of_inputs.long(), torch.arange(inputs) // (inputs // num_groups)):
                return None
            if low >= 0 and high < num_groups:
                return groups
            if low != -1 or high != -1:  # compressed-tensors' word for none
                outside = int(low if low < 0 else high)
                raise CheckpointError(f"{groups} must be in [0, {num_groups}), got {outside}")
        if not can_be_runs:
            raise CheckpointError(f"{scale} must have groups of equal length of {inputs} inputs, got {num_groups}")
        return None
