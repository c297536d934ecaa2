"""The layers of the text decoder: tensors in, tensors out.

Between a layer's parts the loop in `decoder.py` stores keys and values, attends and asks the trimming policy; a layer
knows neither pages nor sequences.
"""

import torch
from torch import Tensor

from trimserve import ops
from trimserve.model.adapters import RowAdapters
from trimserve.model.pieces import MLP_ROWS
from trimserve.model.projection import Projection, projection_of
from trimserve.model.ranks import Ranks
from trimserve.model.transformers_mllama import CrossLayerParts, NormParts, SelfLayerParts

__all__ = ["CrossLayer", "RmsNorm", "SelfLayer"]


class RmsNorm:
    """A norm of a checkpoint."""

    def __init__(self, norm: NormParts) -> None:
        """Borrow the norm's weight."""
        self.weight = norm.weight.data
        self.epsilon = norm.epsilon

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., K] -> the same shape."""
        return ops.rms_norm(rows, self.weight, self.epsilon)


Part = Projection | RmsNorm


class _Layer:
    """What self- and cross-attention layers share: the shape of heads and the MLP."""

    def __init__(self, layer: SelfLayerParts | CrossLayerParts, index: int, head_dim: int, ranks: Ranks) -> None:
        self.index = index
        """Position among the layers of its kind, from 0."""
        self._head_dim = head_dim
        self.scale = head_dim**-0.5
        """Factor of the logits."""
        self._input_norm = RmsNorm(layer.input_norm)
        self._mlp_norm = RmsNorm(layer.mlp_norm)
        self._gate_up = projection_of(*layer.gate_up)
        self._output = projection_of(layer.output, ranks=ranks)
        self._down = projection_of(layer.down, ranks=ranks)

    def _with_mlp(self, hidden: Tensor, adapters: RowAdapters | None, gate: float = 1.0) -> Tensor:
        # Adapters name rows of the whole batch, which is therefore not cut.
        pieces = hidden.split(MLP_ROWS) if adapters is None else (hidden,)
        added = [self._with_rows_mlp(rows, adapters, gate) for rows in pieces]
        return added[0] if len(added) == 1 else torch.cat(added)

    def _with_rows_mlp(
        self, rows: Tensor, adapters: RowAdapters | None, gate: float, counts: Tensor | None = None
    ) -> Tensor:
        """Rows whose count is 0 stay as they are."""
        between = ops.silu_gate(self._gate_up(self._mlp_norm(rows), adapters), counts)
        return self._down.added_to(rows, between, gate, adapters)

    def _heads(self, rows: Tensor) -> Tensor:
        """[R, heads * Dh] -> [R, heads, Dh]."""
        return rows.view(rows.shape[0], -1, self._head_dim)


class SelfLayer(_Layer):
    """A self-attention layer."""

    def __init__(self, layer: SelfLayerParts, index: int, head_dim: int, ranks: Ranks) -> None:
        """Borrow the weights of transformers' layer, the `index`-th of its kind."""
        super().__init__(layer, index, head_dim, ranks)
        self._qkv = projection_of(*layer.qkv)
        self._split = [len(linear.weight) // head_dim for linear in layer.qkv]

    @property
    def decode_parts(self) -> list[Part]:
        """The weights of a decode step, in the order of `ops.decode_layers`."""
        return [self._input_norm, self._qkv, self._output, self._mlp_norm, self._gate_up, self._down]

    def project(self, hidden: Tensor, adapters: RowAdapters | None) -> Tensor:
        """Rows [R, D] -> queries, keys and values [R, H + 2 * Hkv, Dh], to be rotated."""
        return self._heads(self._qkv(self._input_norm(hidden), adapters))

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [R, H, Dh], keys and values [R, Hkv, Dh] of what `project` returns."""
        q, k, v = heads.split(self._split, dim=1)
        return q, k, v

    def finish(self, hidden: Tensor, attended: Tensor, adapters: RowAdapters | None) -> Tensor:
        """What came in, [R, D], and what it attended to, [R, H * Dh] -> what goes out, [R, D], maybe in its place."""
        return self._with_mlp(self._output.added_to(hidden, attended, adapters=adapters), adapters)


class CrossLayer(_Layer):
    """A cross-attention layer, for rows that see an image."""

    def __init__(self, layer: CrossLayerParts, index: int, head_dim: int, ranks: Ranks) -> None:
        """Borrow the weights of transformers' layer, the `index`-th of its kind."""
        super().__init__(layer, index, head_dim, ranks)
        self._attention_gate = layer.attention_gate.tanh().item()
        self._mlp_gate = layer.mlp_gate.tanh().item()
        self._query = projection_of(layer.query)
        self._kv = projection_of(*layer.kv)
        self._q_norm = RmsNorm(layer.q_norm)
        self._k_norm = RmsNorm(layer.k_norm)

    @property
    def decode_parts(self) -> list[Part]:
        """The weights of a decode step, in the order of `ops.decode_layers`."""
        query: list[Part] = [self._input_norm, self._query, self._q_norm]
        return [*query, self._output, self._mlp_norm, self._gate_up, self._down]

    @property
    def gates(self) -> list[float]:
        """Factors of what attention and MLP add."""
        return [self._attention_gate, self._mlp_gate]

    def queries(self, hidden: Tensor, adapters: RowAdapters | None) -> Tensor:
        """Rows [S, D] -> [S, H, Dh]."""
        return self._q_norm(self._heads(self._query(self._input_norm(hidden), adapters)))

    def keys_values(self, features: Tensor, adapters: RowAdapters | None) -> tuple[Tensor, Tensor]:
        """Features [N, D] -> keys and values [N, Hkv, Dh]; on a CPU a row's do not depend on the other rows."""
        projected = self._kv.row_by_row(features, adapters)
        keys, values = (self._heads(part) for part in projected.chunk(2, dim=-1))
        return self._k_norm(keys), values

    def finish(self, hidden: Tensor, attended: Tensor, adapters: RowAdapters | None) -> tuple[Tensor, Tensor]:
        """End the layer.

        Args:
            hidden: [S, D], what came in.
            attended: [S, H * Dh].
            adapters: of these rows.
        Returns:
            What goes out, [S, D], and what attention came to before its gate, [S, D] (see `gated`).
        """
        added = self._output(attended, adapters)
        residual = hidden.add(added, alpha=self._attention_gate)
        return self._with_mlp(residual, adapters, self._mlp_gate), added

    def finish_step(
        self, hidden: Tensor, attended: Tensor, adapters: RowAdapters | None, counts: Tensor | None
    ) -> Tensor:
        """End the layer in a decode step, where nobody asks what attention came to.

        Args:
            hidden: [S, D], what came in.
            attended: [S, H * Dh].
            adapters: of these rows.
            counts: int32 [S], features that each row sees; one that sees none, and so attended to zeros, passes
                unchanged. None if all see some.
        Returns:
            What goes out, [S, D], maybe in the place of what came in.
        """
        residual = self._output.added_to(hidden, attended, self._attention_gate, adapters)
        return self._with_rows_mlp(residual, adapters, self._mlp_gate, counts)

    def gated(self, added: Tensor) -> Tensor:
        """What attention adds to the rows, [S, D], after its gate."""
        return self._attention_gate * added
