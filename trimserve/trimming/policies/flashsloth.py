"""The policy `flashsloth`: windows pooled by a trained attention, and queries that look for what the question asks."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimserve.trimming.compressor import Compressor, grid, shares, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["FlashSloth", "FlashSlothRows"]


class FlashSlothRows(Compressor):
    """Spatial attention pooling and embedded queries, see `FlashSloth`."""

    reads_text: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        width, inside, num_new = shape.width, self.inside, shape.rows - 1
        num_windows = max(1, isqrt(num_new - 1) ** 2) if num_new > 1 else 1
        windows = grid(shape.features_per_tile - 1, num_windows)
        self.register_buffer("in_window", windows == torch.arange(num_windows)[:, None], persistent=False)
        self.norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.saliency = nn.Sequential(nn.Linear(width, inside), nn.GELU(), silent(inside, 1))
        self.queries = nn.Parameter(torch.randn(num_new - num_windows, inside))
        self.text = nn.Linear(width, inside)
        self.query = nn.Linear(inside, inside)
        self.key = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.output = silent(inside, width)

    in_window: Tensor
    """bool [windows, P]"""

    @staticmethod
    def assign(num_patches: int, num_new_rows: int) -> Tensor:
        """See `Compressor.assign`."""
        return shares(num_patches, num_new_rows)

    def weights(self, tiles: Tensor, text: Tensor | None) -> Tensor:
        """See `Compressor.weights`."""
        assert text is not None, "it reads the question"
        patches = self.norm(tiles[:, 1:])
        salient = self.saliency(patches).transpose(1, 2).masked_fill(~self.in_window, -torch.inf)
        asking = F.gelu(self.queries + self.text(self.text_norm(text.float()))[:, None])
        asked = self.query(asking) @ self.key(patches).transpose(1, 2) / self.inside**0.5
        return torch.cat([salient, asked], dim=1).softmax(dim=-1)

    def change(self, tiles: Tensor, weights: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - in the weights
        """See `Compressor.change`."""
        output: Tensor = self.output(F.gelu(weights @ self.value(self.norm(tiles[:, 1:]))))
        return output


@dataclass(frozen=True, slots=True)
class FlashSloth(Learned):
    """Windows are pooled by how salient their patches are, and a few embedded queries look at the whole tile.

        a[w] = softmax_n(MLP(f[n])) over the patches of window w
        a[e] = softmax_n(W_q gelu(e + W_t text) . W_k f[n] / sqrt(d)) over all patches, for each embedded query e
        row = sum_n a[n] f[n] + W_o gelu(sum_n a[n] W_v f[n])

    Of R - 1 new rows the largest square number below is of windows, the rest are queries. The choice holds for one
    question.

    Source: FlashSloth, arXiv 2412.04317, spatial attention pooling and embedded queries. Adapted: queries learn of the
    question from the mean of its embeddings, where the paper lets them attend to the text within the language model;
    every row weighs as much, since a query counts for no patches of its own. Left out: training the model itself.
    """

    name: ClassVar[str] = "flashsloth"
    reads_text: ClassVar[bool] = True
    trained: ClassVar[type[Compressor]] = FlashSlothRows
