"""The images of one sequence during its prefill: rows of features, before and after selection."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from trimserve.model.prefilled import TrimTimes
from trimserve.trimming.plan import Selection, TrimPlan

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
    trim: TrimPlan
    selection: Selection | None = field(default=None, init=False)
    """None before it, and where nothing can be dropped."""
    trim_times: TrimTimes | None = field(default=None, init=False)
    later_trim_times: list[TrimTimes] = field(default_factory=list, init=False)
    """Of later cross-attention layers that trim again."""
    layer_rows: list[tuple[int, ...]] = field(default_factory=list, init=False)
    """Rows of each image that each cross-attention layer holds, of the layers until now."""
    has_left: bool = field(default=False, init=False)
    """Whether the layers to come see nothing of them (`Policy.exit_rule`)."""
    num_merged: tuple[int, ...] = field(default=(), init=False)
    """Merged rows among each image's; empty when nothing is merged."""
    bias: Tensor | None = field(default=None, init=False)
    """[rows of `features`], added to every logit of a row, in features' dtype; None: nothing is."""

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Rows of each image in `features` that are no merged ones."""
        num_merged = self.num_merged or (0,) * len(self.num_features)
        return tuple(rows - merged for rows, merged in zip(self.num_features, num_merged, strict=True))

    @property
    def kept_places(self) -> Tensor:
        """Where `features` has those, int64, ascending."""
        return self._places()[0]

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
        stays = everything.index_select(0, selection.kept)  # on a CPU faster than indexing
        self.selection = selection
        self.num_merged = () if groups is None else groups.num_groups
        self._count(selection.num_kept)
        kept, merged = self._places()
        if groups is None:
            self.features = stays
        else:
            num_rows = sum(self.num_features)
            self.features = everything.new_empty(num_rows, everything.shape[1])
            self.features.index_copy_(0, kept, stays).index_copy_(0, merged, groups.mean(everything))
            self.bias = everything.new_zeros(num_rows)
            self.bias[merged] = groups.sizes.log().to(everything.dtype)
        return kept, merged

    def hold_fewer(self, selection: Selection) -> Tensor:
        """Go on with some of the kept rows; the merged ones all stay.

        Args:
            selection: its features are `kept_places`, and it merges nothing.
        Returns:
            Which of the rows stay, int64, ascending.
        """
        kept, merged = self._places()
        rows = torch.cat([kept[selection.kept], merged]).sort().values
        self.features = self.features[rows]
        self.bias = None if self.bias is None else self.bias[rows]
        self._count(selection.num_kept)
        return rows

    def _count(self, num_kept: Sequence[int]) -> None:
        num_merged = self.num_merged or (0,) * len(num_kept)
        self.num_features = tuple(map(sum, zip(num_kept, num_merged, strict=True)))

    def _places(self) -> tuple[Tensor, Tensor]:
        """Where `features` has kept rows and merged ones: int64, each ascending."""
        num_merged = self.num_merged or (0,) * len(self.num_features)
        counts = [n for of_image in zip(self.num_kept, num_merged, strict=True) for n in of_image]
        runs = torch.arange(sum(counts), device=self.features.device).split(counts)
        return torch.cat(runs[::2]), torch.cat(runs[1::2])
