"""The images of one sequence during its prefill: rows of features, before and after selection."""

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

    @property
    def held_bias(self) -> Tensor | None:
        """`bias` of those."""
        first, end = self.held_range
        return None if self.bias is None else self.bias[first:end]

    def hold(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Go on with what was selected; the merged rows of each image come behind its kept ones.

        Args:
            selection: what is kept and merged; the weight of a merged row becomes its bias.
        Returns:
            Where `features` now has the kept rows and the merged ones: int64 [M] and [G], each ascending.
        """
        everything, groups = self.features, selection.groups
        self.selection = selection
        self.num_merged = () if groups is None else groups.num_groups
        num_merged = self.num_merged or (0,) * len(selection.num_kept)
        counts = [n for of_image in zip(selection.num_kept, num_merged, strict=True) for n in of_image]
        runs = torch.arange(sum(counts), device=everything.device).split(counts)
        kept, merged = torch.cat(runs[::2]), torch.cat(runs[1::2])
        self.num_features = tuple(map(sum, zip(selection.num_kept, num_merged, strict=True)))
        if groups is None:
            self.features = everything[selection.kept]
        else:
            self.features = everything.new_empty(sum(counts), everything.shape[1])
            self.features[kept] = everything[selection.kept]
            self.features[merged] = groups.mean(everything)
            self.bias = everything.new_zeros(sum(counts))
            self.bias[merged] = groups.sizes.log().to(everything.dtype)
        return kept, merged
