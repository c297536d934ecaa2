"""The policy `wico`: a trained compressor makes a row of each window's patches, laid side by side."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from trimserve.trimming.compressor import Compressor, Regions, silent
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.trained import Shape

__all__ = ["WiCo", "WiCoRows", "grid"]


class WiCoRows(Compressor):
    """Window concatenation, see `WiCo`."""

    def __init__(self, shape: Shape) -> None:
        """See `Compressor`."""
        super().__init__(shape)
        windows = grid(shape.features_per_tile - 1, self.new_rows_per_tile)
        self.register_buffer("windows", windows, persistent=False)
        places = [(windows == number).nonzero()[:, 0] for number in range(self.new_rows_per_tile)]
        self.register_buffer("slots", pad_sequence(places, batch_first=True), persistent=False)
        is_filled = pad_sequence([torch.ones_like(each) for each in places], batch_first=True)
        self.register_buffer("is_filled", is_filled, persistent=False)
        self.norm = nn.LayerNorm(shape.width)
        self.joined = nn.Linear(self.slots.shape[1] * shape.width, self.inside)
        self.output = silent(self.inside, shape.width)

    windows: Tensor
    """int64 [patches of a tile], the window of each."""
    slots: Tensor
    """int64 [windows of a tile, S], the patches of each; a smaller window has fewer."""
    is_filled: Tensor
    """int64 [windows of a tile, S], 0 where a window has no further patch."""

    def group(self, patches: Tensor, num_rows: int) -> Tensor:
        """See `Compressor.group`."""
        first = torch.arange(0, num_rows, self.new_rows_per_tile, device=patches.device)
        return (first[:, None] + self.windows).flatten().expand(len(patches), -1)

    def made(self, patches: Tensor, regions: Regions, text: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - reads no text
        """See `Compressor.made`."""
        tiles = self.norm(patches).unflatten(1, (-1, len(self.windows)))
        inside: Tensor = self.joined.bias
        places = zip(self.joined.weight.split(self.shape.width, 1), self.slots.T, self.is_filled.T, strict=True)
        for weight, slot, is_filled in places:  # one place of all windows
            inside = inside + F.linear(tiles[:, :, slot] * is_filled[:, None], weight)
        return regions.mean(patches), self.output(F.gelu(inside)).flatten(1, 2)


def grid(num_patches: int, num_windows: int) -> Tensor:
    """Cut a tile into windows, as square as their number allows.

    Args:
        num_patches: P, of the tile, a square number.
        num_windows: W = a * b with a and b at most the tile's side.
    Returns:
        int64 [P], the window of each patch, row by row.
    Raises:
        ValueError: there is no such a and b.

    >>> grid(16, 4).view(4, 4)[0].tolist()
    [0, 0, 1, 1]
    """
    side = isqrt(num_patches)
    high = next((high for high in range(isqrt(num_windows), 0, -1) if num_windows % high == 0), 0)
    if not high or num_windows // high > side:
        raise ValueError(f"must be 1 + a * b with a and b at most {side}, got {num_windows + 1}")
    place = torch.arange(side)
    wide = num_windows // high
    return ((place * high // side)[:, None] * wide + place * wide // side).flatten()


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
