"""The policy `tokenpacker`: a coarse row of each region, into which a trained compressor injects its detail."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, Regions, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["TokenPacker", "TokenPackerRows"]


class TokenPackerRows(Compressor):
    """Region-to-point injection, see `TokenPacker`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.coarse_norm = nn.LayerNorm(width)
        self.fine_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.mixed = nn.Linear(2 * inside, inside)
        self.output = silent(inside, width)

    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - reads no text
        """See `Compressor.made`."""
        coarse, fine = regions.mean(patches), self.fine_norm(patches)
        query = self.query(self.coarse_norm(coarse))
        logits = (regions.spread(query) * self.key(fine)).sum(dim=-1, keepdim=True) / self.inside**0.5
        injected = regions.sum(regions.softmax(logits) * self.value(fine))
        mixed = self.mixed(torch.cat([query, injected], dim=-1))
        return coarse, self.output(F.gelu(mixed))


@dataclass(frozen=True, slots=True)
class TokenPacker(Learned):
    """Of every region of patches one row stays: their mean, and what attention of that mean to the patches injects.

        q[w] = W_q mean_n f[n],   k = W_k f,   v = W_v f
        row[w] = mean_n f[n] + W_o gelu(W_m [q[w], sum_n softmax_n(q[w] . k[n] / sqrt(d)) v[n]])

    n runs over the patches of region w. The choice serves every question on the image.

    Source: TokenPacker, arXiv 2407.02392, section on the visual projector. Adapted: regions are patches that are
    alike, not windows, and their means the coarse features, not an interpolated image; Mllama's features hold several
    layers of the encoder already, which the paper gathers for its keys and values. Left out: training the
    language model along.
    """

    name: ClassVar[str] = "tokenpacker"
    trained: ClassVar[type[Compressor]] = TokenPackerRows
