"""A decode step's layers as one op, on a CPU.

Elsewhere, and for larger batches, the decoder runs the layers one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimserve import ops
from trimserve.model.decoder_layers import CrossLayer, RmsNorm, SelfLayer
from trimserve.model.int4 import UNIT
from trimserve.model.key_values import BatchTables, FeatureTables
from trimserve.model.projection import Projection
from trimserve.model.rotary import Rotation

__all__ = ["CompiledDecode"]

_NO_SCALES = torch.empty(0)


@dataclass(frozen=True, slots=True)
class CompiledDecode:
    """`ops.decode_layers` with the weights of one checkpoint."""

    layers: ops.DecoderLayers
    most_rows: float
    """The largest batch for which this is faster than running the layers one by one."""

    @classmethod
    def of(cls, layers: Sequence[SelfLayer | CrossLayer]) -> "CompiledDecode | None":
        """Describe all layers of a decoder.

        Returns:
            None if the op cannot run these layers: norms with different epsilons, a linear layer with a bias, int4
            weights of inputs that are no whole units, or weights that are not on the CPU.
        """
        parts = [part for layer in layers for part in layer.decode_parts]
        linears = [part for part in parts if isinstance(part, Projection)]
        norms = [part for part in parts if isinstance(part, RmsNorm)]
        epsilons = {norm.epsilon for norm in norms}
        if len(epsilons) != 1 or any(linear.bias is not None for linear in linears):
            return None
        if any(part.weight.device.type != "cpu" for part in parts):
            return None
        is_int4 = any(linear.weight.dtype == torch.uint8 for linear in linears)
        if is_int4 and len(norms[0].weight) % UNIT:
            return None
        cross = {index: layer for index, layer in enumerate(layers) if isinstance(layer, CrossLayer)}
        described = ops.DecoderLayers(
            weights=[part.weight for part in parts],
            scales=[_NO_SCALES if linear.scales is None else linear.scales for linear in linears],
            cross_layers=[*cross],
            gates=[gate for layer in cross.values() for gate in layer.gates],
            epsilon=epsilons.pop(),
        )
        return cls(described, min(linear.most_rows(norms[0].weight.dtype) for linear in linears))

    def __call__(self, hidden: Tensor, rotation: Rotation, text: BatchTables, features: FeatureTables | None) -> None:
        """Run new rows through all layers, in place.

        Args:
            hidden: [B, D], the rows that see features first; becomes the last layer's output.
            rotation: of the rows.
            text: page tables of the self-attention layers.
            features: page tables of the cross-attention layers; None if no row sees features.
        """
        ops.decode_layers(
            self.layers,
            hidden,
            text.pages,
            (rotation.cosines, rotation.sines),
            ops.SelfTables(text.tables, text.lengths, text.slots),
            None if features is None else ops.CrossTables(features.tables, features.lengths, features.biases),
        )
