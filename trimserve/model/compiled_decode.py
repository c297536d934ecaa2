"""A decode step's layers as one op, on a CPU: nothing of Python between the ops.

Elsewhere `RaggedDecoder.decode` takes the layers one by one, which also says what this computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimserve import ops
from trimserve.model.decoder_layers import CrossLayer, RmsNorm, SelfLayer
from trimserve.model.key_values import BatchTables, FeatureTables
from trimserve.model.projection import Projection
from trimserve.model.rotary import Rotation

__all__ = ["CompiledDecode"]


@dataclass(frozen=True, slots=True)
class CompiledDecode:
    """`ops.decode_layers` with the weights of one checkpoint."""

    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    """Of int8 weights."""
    cross_layers: tuple[int, ...]
    gates: tuple[float, ...]
    epsilon: float
    most_rows: float
    """Up to so many rows it is faster than layer by layer."""

    @classmethod
    def of(cls, layers: Sequence[SelfLayer | CrossLayer]) -> "CompiledDecode | None":
        """Collect the layers of a decoder; None if norms differ in more than weights, or a linear layer has a bias."""
        parts = [part for layer in layers for part in layer.decode_parts]
        linears = [part for part in parts if isinstance(part, Projection)]
        norms = [part for part in parts if isinstance(part, RmsNorm)]
        epsilons = {norm.epsilon for norm in norms}
        if len(epsilons) != 1 or any(linear.bias is not None for linear in linears):
            return None
        cross = {index: layer for index, layer in enumerate(layers) if isinstance(layer, CrossLayer)}
        return cls(
            weights=tuple(part.weight for part in parts),
            scales=tuple(linear.scales for linear in linears if linear.scales is not None),
            cross_layers=tuple(cross),
            gates=tuple(gate for layer in cross.values() for gate in layer.gates),
            epsilon=epsilons.pop(),
            most_rows=min(linear.most_rows(norms[0].weight.dtype) for linear in linears),
        )

    def __call__(self, hidden: Tensor, rotation: Rotation, text: BatchTables, features: FeatureTables | None) -> None:
        """Rows `hidden` [R, D] become the last layer's output; those that see features come first."""
        ops.decode_layers(
            hidden,
            text.pages,
            self.weights,
            self.scales,
            self.cross_layers,
            self.gates,
            rotation.cosines,
            rotation.sines,
            text.tables,
            text.lengths,
            text.slots,
            () if features is None else features.tables,
            () if features is None else features.lengths,
            () if features is None else features.biases,
            self.epsilon,
        )
