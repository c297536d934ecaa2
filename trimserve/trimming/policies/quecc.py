"""The policy `quecc`: rows that a trained compressor makes of each region, by what the question asks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, Regions, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["QueCC", "QueCCRows"]


class QueCCRows(Compressor):
    """Query-based convolutional cross-attention, see `QueCC`."""

    reads_text: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside = shape.width, self.inside
        self.norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.text = nn.Linear(width, inside)
        self.features = nn.Linear(width, inside)
        self.kernel = nn.Parameter(torch.ones(shape.features_per_tile - 1, inside))
        self.query = silent(inside, inside)
        self.key = nn.Linear(inside, inside)
        self.value = nn.Linear(width, inside)
        self.joined = nn.Linear(2 * inside, inside)
        self.output = silent(inside, width)

    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Compressor.made`."""
        assert text is not None, "it reads the question"
        normal, asked = self.norm(patches), self.text(self.text_norm(text.float()))[:, None]
        x, values = F.gelu(self.features(normal) + asked), self.value(normal)
        del normal  # as large as the patches, which are weighed below
        kernel = self.kernel.repeat(patches.shape[1] // len(self.kernel), 1)
        query = self.query(regions.mean(kernel * x))
        logits = (regions.spread(query) * self.key(x)).sum(dim=-1, keepdim=True) / self.inside**0.5
        weights = regions.softmax(logits)
        seen = regions.sum(weights * values)
        joined = self.joined(torch.cat([seen, asked.expand_as(seen)], dim=-1))
        return regions.sum(weights * patches), self.output(F.gelu(joined))


@dataclass(frozen=True, slots=True)
class QueCC(Learned):
    """Of every region of patches one row stays, made by cross-attention that knows the question.

        x[n] = gelu(W_f f[n] + W_t text),   q[w] = W_q mean_n c[n] * x[n],   a[w] = softmax_n(q[w] . W_k x[n] / sqrt(d))
        row[w] = sum_n a[w, n] f[n] + W_o gelu(W_j [sum_n a[w, n] W_v f[n], W_t text])

    n runs over the patches of region w; c has one weight for each place and channel (a depthwise convolution as large
    as its stride). The choice holds for one question.

    Source: QueCC, arXiv 2411.03312, section on query-based compression. Adapted: regions are patches that are
    alike, not windows; the question is the mean of its tokens' embeddings, where the paper asks the language model for
    its last state; the region's mean is added, so that training starts from merging. Left out:
    training projector and language model along.
    """

    name: ClassVar[str] = "quecc"
    reads_text: ClassVar[bool] = True
    trained: ClassVar[type[Compressor]] = QueCCRows
