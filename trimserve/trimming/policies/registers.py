"""The policy `registers`: a few trained registers summarise an image."""

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
    """Registers that read an image, see `Registers`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.norm = nn.LayerNorm(width)
        self.registers = nn.Parameter(torch.randn(self.new_rows_per_tile, inside))
        self.home = nn.Parameter(torch.full((self.new_rows_per_tile, 1), _HOME))
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.output = silent(inside, width)

    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - reads no text
        """See `Compressor.made`."""
        keys, values = (of(self.norm(patches)) for of in (self.key, self.value))
        num_tiles = regions.sizes.shape[1] // self.new_rows_per_tile
        registers, home = (each.repeat(num_tiles, 1) for each in (self.registers, self.home))
        at_home = regions.spread(home.expand(len(patches), -1, -1)).transpose(1, 2)
        read = regions.mean(values)
        for _ in range(_ROUNDS):
            query = self.query(F.gelu(registers + read)) / self.inside**0.5
            weights = (query @ keys.transpose(1, 2)).scatter_add_(1, regions.group[:, None], at_home).softmax(dim=-1)
            read = weights @ values
        return weights @ patches, self.output(F.gelu(registers + read))


@dataclass(frozen=True, slots=True)
class Registers(Learned):
    """A few registers read the image, and stay instead of its patches.

        u[r] = mean_n v[n] over the patches of region r;   twice:
            a[r] = softmax_n(W_q gelu(register[r] + u[r]) . W_k f[n] / sqrt(d) + b[r] own[r, n])
            u[r] = sum_n a[r, n] v[n]
        row[r] = sum_n a[r, n] f[n] + W_o gelu(register[r] + u[r]),   v = W_v f

    n runs over all patches; every tile has registers of its own; own is 1 within region r. The choice serves every
    question on the image.

    Source: Victor, arXiv 2410.14072, visual registers. Adapted: registers read the image in rounds of their own, where
    the paper lets them do so in the first layers of the language model; Mllama's decoder has no attention from features
    to features. Each begins at a region of patches that are alike, so that training starts near their means.
    """

    name: ClassVar[str] = "registers"
    trained: ClassVar[type[Compressor]] = RegistersRows
