"""A decode step's layers as one op, where all weights are plain and on a CPU: nothing of Python between the ops.

Elsewhere `RaggedDecoder.decode` takes the layers one by one, which also says what this computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimserve import ops
from trimserve.models.decoder_layers import BatchRows, CrossLayer, RmsNorm, SelfLayer
from trimserve.models.key_values import BatchTables
from trimserve.models.linear import FloatLinear

__all__ = ["CompiledDecode"]


@dataclass(frozen=True, slots=True)
class CompiledDecode:
    """`ops.decode_layers` with the weights of one checkpoint."""

    weights: tuple[Tensor, ...]
    cross_layers: tuple[int, ...]
    gates: tuple[float, ...]
    epsilon: float
    most_rows: int
    """Up to so many rows it is faster than layer by layer."""

    @classmethod
    def of(cls, layers: Sequence[SelfLayer | CrossLayer]) -> "CompiledDecode | None":
        """Of all layers of a decoder; None where an op of theirs is not `ops.linear`."""
        parts = [part for layer in layers for part in layer.decode_parts]
        linears = [part for part in parts if isinstance(part, FloatLinear)]
        norms = [part for part in parts if isinstance(part, RmsNorm)]
        epsilons = {norm.epsilon for norm in norms}
        if len(linears) + len(norms) < len(parts) or len(epsilons) != 1:
            return None
        cross = {index: layer for index, layer in enumerate(layers) if isinstance(layer, CrossLayer)}
        return cls(
            weights=tuple(part.weight for part in parts if isinstance(part, FloatLinear | RmsNorm)),
            cross_layers=tuple(cross),
            gates=tuple(gate for layer in cross.values() for gate in layer.gates),
            epsilon=epsilons.pop(),
            most_rows=min(linear.most_rows for linear in linears),
        )

    def __call__(self, hidden: Tensor, batch: BatchRows, text: BatchTables, features: BatchTables | None) -> None:
        """One new row of each sequence, `hidden` [B, D], becomes the last layer's output; those that see come first."""
        ops.decode_layers(
            hidden,
            text.pages,
            self.weights,
            self.cross_layers,
            self.gates,
            batch.cosines,
            batch.sines,
            text.tables,
            text.lengths,
            text.slots,
            None if features is None else features.tables,
            None if features is None else features.lengths,
            None if features is None else features.bias,
            self.epsilon,
        )
