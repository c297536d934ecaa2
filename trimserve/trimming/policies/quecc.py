"""The policy `quecc`: rows that a trained compressor makes of each window, by what the question asks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, silent
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
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(inside, inside)
        self.value = nn.Linear(width, inside)
        self.joined = nn.Linear(2 * inside, inside)
        self.output = silent(inside, width)

    def change(self, tiles: Tensor, weights: Tensor, text: Tensor | None) -> Tensor:
        """See `Compressor.change`."""
        assert text is not None, "it reads the question"
        patches = self.norm(tiles[:, 1:])
        asked = self.text(self.text_norm(text.float()))[:, None]
        x = F.gelu(self.features(patches) + asked)
        query = self.query(weights @ (self.kernel * x))
        logits = query @ self.key(x).transpose(1, 2) / self.inside**0.5
        seen = logits.masked_fill(~self.is_own, -torch.inf).softmax(dim=-1) @ self.value(patches)
        joined = self.joined(torch.cat([seen, asked.expand_as(seen)], dim=-1))
        output: Tensor = self.output(F.gelu(joined))
        return output


@dataclass(frozen=True, slots=True)
class QueCC(Learned):
    """Of every window of patches one row stays, made by cross-attention that knows the question.

        x[n] = gelu(W_f f[n] + W_t text),   q[w] = W_q mean_n c[n] * x[n],   k = W_k x,   v = W_v f
        row[w] = mean_n f[n] + W_o gelu(W_j [sum_n softmax_n(q[w] . k[n] / sqrt(d)) v[n], W_t text])

    n runs over the patches of window w; c has one weight for each place and channel (a depthwise convolution as large
    as its stride). The choice holds for one question.

    Source: QueCC, arXiv 2411.03312, section on query-based compression. Adapted: the question is the mean of its
    tokens' embeddings, where the paper asks the language model for its last state; the window's mean is added, so that
    training starts from pooling. Left out: training projector and language model along.
    """

    name: ClassVar[str] = "quecc"
    reads_text: ClassVar[bool] = True
    trained: ClassVar[type[Compressor]] = QueCCRows
