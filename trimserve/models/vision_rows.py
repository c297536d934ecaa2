"""The images of one sequence during its prefill: rows of features, before and after selection."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from trimserve.models.prefilled import TrimTimes
from trimserve.models.trimming import Selection, TrimParams

__all__ = ["VisionRows"]


@dataclass(slots=True)
class VisionRows:
    """What the rows of one prompt see."""

    features: Tensor
    """[N, hidden_size], the images' features one after another; after selection those that are kept, and behind
    each image's the rows that the others are merged into."""
    num_features: tuple[int, ...]
    """Rows of each image in `features`."""
    visible_images: list[tuple[int, int]]
    """Of each row: the half-open range of images that it sees."""
    features_per_tile: int
    trim: TrimParams
    selection: Selection | None = field(default=None, init=False)
    """None before it, and where nothing can be dropped."""
    trim_times: TrimTimes | None = field(default=None, init=False)
    num_merged: tuple[int, ...] = field(default=(), init=False)
    """Merged rows among each image's; empty when nothing is merged."""
    bias: Tensor | None = field(default=None, init=False)
    """[rows of `features`], added to every logit of a row, in features' dtype; None: nothing is."""

    @property
    def offsets(self) -> list[int]:
        """Where each image's features begin, and the end of the last."""
        return [0, *accumulate(self.num_features)]

    @property
    def held_range(self) -> tuple[int, int]:
        """The features that the last row sees."""
        first, last = self.visible_images[-1]
        return self.offsets[first], self.offsets[last]

    def hold(self, selection: Selection, kept: Sequence[Tensor], everything: Sequence[Tensor]) -> Sequence[Tensor]:
        """Go on with what was selected; the merged rows of each image come behind its kept ones.

        Args:
            selection: what is kept and merged; the weight of a merged row becomes its bias.
            kept: the kept rows of `features` and of what goes with them.
            everything: all rows of the same.
        Returns:
            What goes with the features, rows as in `features` now.
        """
        self.selection = selection
        self.num_features = selection.num_kept
        groups = selection.groups
        if groups is not None:
            self.num_merged = groups.num_groups
            images = range(len(selection.num_kept))
            counts = torch.tensor([*selection.num_kept, *groups.num_groups])
            order = torch.tensor([*images, *images]).repeat_interleave(counts).argsort(stable=True)
            order = order.to(self.features.device)
            bias = torch.cat([self.features.new_zeros(len(selection.kept)), groups.sizes.log().to(self.features.dtype)])
            kept = [torch.cat([part, groups.mean(rows)])[order] for part, rows in zip(kept, everything, strict=True)]
            self.num_features = tuple(map(sum, zip(selection.num_kept, groups.num_groups, strict=True)))
            self.bias = bias[order]
        self.features = kept[0]
        return kept[1:]
