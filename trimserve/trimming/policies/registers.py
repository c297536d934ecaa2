"""The policy `registers`: a few trained registers summarise each tile."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["Registers", "RegistersRows"]

_ROUNDS = 2
_HOME = 4.0
"""How much likelier a register looks at its window of the tile than elsewhere, as a logit, before training."""


class RegistersRows(Compressor):
    """Registers that read a tile, see `Registers`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.norm = nn.LayerNorm(width)
        self.registers = nn.Parameter(torch.randn(shape.rows - 1, inside))
        self.home = nn.Parameter(_HOME * self.is_own.float())
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.output = silent(inside, width)

    def weights(self, tiles: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - reads no text
        """See `Compressor.weights`."""
        patches = self.norm(tiles[:, 1:])
        keys, values = self.key(patches).transpose(1, 2), self.value(patches)
        state, weights = self.registers.expand(len(tiles), -1, -1), self.means
        for _ in range(_ROUNDS):
            weights = (self.query(F.gelu(state)) @ keys / self.inside**0.5 + self.home).softmax(dim=-1)
            state = state + weights @ values
        return weights

    def change(self, tiles: Tensor, weights: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - reads no text
        """See `Compressor.change`."""
        output: Tensor = self.output(F.gelu(weights @ self.value(self.norm(tiles[:, 1:]))))
        return output


@dataclass(frozen=True, slots=True)
class Registers(Learned):
    """A few registers read each tile, and stay instead of its patches.

        twice:  a[r] = softmax_n(W_q gelu(s[r]) . W_k f[n] / sqrt(d) + b[r, n]),   s[r] += sum_n a[r, n] W_v f[n]
        row[r] = sum_n a[r, n] f[n] + W_o gelu(sum_n a[r, n] W_v f[n])

    s begins as the register, b as a preference for a window of its own; both are trained. The choice serves
    every question on the image.

    Source: Victor, arXiv 2410.14072, visual registers. Adapted: registers read the tile in layers of their own, where
    the paper lets them do so in the first layers of the language model; Mllama's decoder has no attention from features
    to features. What they read is added to a weighted mean, so that training starts near pooling.
    """

    name: ClassVar[str] = "registers"
    trained: ClassVar[type[Compressor]] = RegistersRows
