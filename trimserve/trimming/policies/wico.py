"""The policy `wico`: a trained compressor makes a row of each window's patches, laid side by side."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from trimserve.trimming.compressor import Compressor, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["WiCo", "WiCoRows"]


class WiCoRows(Compressor):
    """Window concatenation, see `WiCo`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        places = [own.nonzero()[:, 0] for own in self.is_own]
        self.register_buffer("slots", pad_sequence(places, batch_first=True), persistent=False)
        is_filled = pad_sequence([torch.ones_like(each) for each in places], batch_first=True)
        self.register_buffer("is_filled", is_filled[..., None], persistent=False)
        self.norm = nn.LayerNorm(shape.width)
        self.joined = nn.Linear(self.slots.shape[1] * shape.width, self.inside)
        self.output = silent(self.inside, shape.width)

    slots: Tensor
    """int64 [W, S], the patches of each window; a smaller window has fewer."""
    is_filled: Tensor
    """int64 [W, S, 1], 0 where a window has no further patch."""

    def change(self, tiles: Tensor, weights: Tensor, text: Tensor | None) -> Tensor:  # noqa: ARG002 - reads no text
        """See `Compressor.change`."""
        windows = self.norm(tiles[:, 1:])[:, self.slots] * self.is_filled
        output: Tensor = self.output(F.gelu(self.joined(windows.flatten(2))))
        return output


@dataclass(frozen=True, slots=True)
class WiCo(Learned):
    """Of every window of patches one row stays: their mean, and what an MLP makes of all of them side by side.

        row[w] = mean_n f[n] + W_o gelu(W_j [f[n_1], f[n_2], ..., f[n_S]])

    n_1 to n_S are the patches of window w, row by row. The choice serves every question on the image.

    Source: WiCo, arXiv 2504.04024, window token concatenation. Adapted: the mean is added, so that training starts from
    pooling; windows of unequal size leave places empty. Left out: fine-tuning the last vision layers, so that features
    of a window become alike, and taking rows apart again in late layers (WiCo+), which both change the model.
    """

    name: ClassVar[str] = "wico"
    trained: ClassVar[type[Compressor]] = WiCoRows
