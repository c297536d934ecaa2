"""bitsandbytes' LLM.int8: int8 weights, and the largest magnitude of each output, which is 127."""

from dataclasses import dataclass

from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.formats.quantized_linear import LinearParts
from trimserve.model.stored_tensors import StoredTensor

__all__ = ["BnbInt8"]

_ONE_127TH = 7.874015718698502e-3


@dataclass(frozen=True, slots=True)
class BnbInt8:
    """See `Int8Linear`."""

    weight: StoredTensor
    magnitudes: StoredTensor
    row_multiple: int = 1

    @classmethod
    def find(cls, parts: LinearParts) -> "BnbInt8 | None":
        """The layer, if it is stored in this format.

        Raises:
            CheckpointError: a part that is missing or does not fit.
        """
        if "SCB" not in parts:
            return None
        outputs, _ = parts.shape
        order = parts.find("weight_format", ("U8",), (), (1,))
        if order is not None and order.read().item() != 0:
            raise CheckpointError(f"{order} must be 0 (row), got {order.read().item()}")
        return cls(parts.get("weight", ("I8",), parts.shape), parts.get("SCB", ("F32",), (outputs,)))

    def floats(self, rows: slice) -> Tensor:
        """See `Int8Linear`."""
        return self.weight.read(rows) * self.magnitudes.read(rows)[:, None] * _ONE_127TH

    def int8(self, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Int8Linear`."""
        return self.weight.read(rows), self.magnitudes.read(rows) * _ONE_127TH
