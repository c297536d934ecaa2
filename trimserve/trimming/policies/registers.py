"""The policy `registers`: a few trained registers summarise each tile."""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, Regions, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["Registers", "RegistersRows"]

_ROUNDS: Final = 2
_HOME: Final = 8.0
"""How much a register looks at its region rather than elsewhere before training, as a logit."""


class RegistersRows(Compressor):
    """Registers that read a tile, see `Registers`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.norm = nn.LayerNorm(width)
        self.registers = nn.Parameter(torch.randn(self.num_new_rows, inside))
        self.home = nn.Parameter(torch.full((self.num_new_rows, 1), _HOME))
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.output = silent(inside, width)

    def weights(self, patches: Tensor, regions: Regions, text: Tensor | None) -> Tensor:  # noqa: ARG002 - reads no text
        """See `Compressor.weights`."""
        normal = self.norm(patches)
        keys, values = self.key(normal).transpose(1, 2), self.value(normal)
        weights, state = regions.means, self.registers
        for _ in range(_ROUNDS):
            state = state + weights @ values
            logits = self.query(F.gelu(state)) @ keys / self.inside**0.5
            weights = (logits + self.home * regions.is_own).softmax(dim=-1)
        return weights

    def change(self, patches: Tensor, regions: Regions, weights: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - reads no text
        """See `Compressor.change`."""
        read = self.registers + weights @ self.value(self.norm(patches))
        output: Tensor = self.output(F.gelu(read))
        return output


@dataclass(frozen=True, slots=True)
class Registers(Learned):
    """A few registers read each tile, and stay instead of its patches.

        a[r] = 1 / n over the patches of region r;   s[r] = register r
        twice:  s[r] += sum_n a[r, n] W_v f[n],   a[r] = softmax_n(W_q gelu(s[r]) . W_k f[n] / sqrt(d) + b[r] own[r, n])
        row[r] = sum_n a[r, n] f[n] + W_o gelu(register r + sum_n a[r, n] W_v f[n])

    n runs over all patches of the tile; own is 1 within region r. The choice serves every question on the image.

    Source: Victor, arXiv 2410.14072, visual registers. Adapted: registers read the tile in rounds of their own, where
    the paper lets them do so in the first layers of the language model; Mllama's decoder has no attention from features
    to features. Each begins at a region of patches that are alike, so that training starts near their means.
    """

    name: ClassVar[str] = "registers"
    trained: ClassVar[type[Compressor]] = RegistersRows
