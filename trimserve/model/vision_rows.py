"""The images of one prompt during its prefill: what its rows still see of them, and what trimming decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve.model.attention import Run
from trimserve.model.interruptible import Interruptible
from trimserve.model.prefilled import TrimTimes
from trimserve.trimming.feature_kv import FeatureKeyValues, Project
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.selection import AHEAD, KeptSet, KeptSets, Selection
from trimserve.trimming.trained import Trained

__all__ = ["VisionRows"]


@dataclass(slots=True)
class VisionRows:
    """What the rows of one prompt see; the loop over layers changes it."""

    features: Tensor
    """[N, hidden_size], the images' features one after another; after a selection those that are kept, and behind each
    image's the rows that others are merged into."""
    num_held: tuple[int, ...]
    """Rows of each image in `features`."""
    visible_images: list[tuple[int, int]]
    """For each row of the prompt the half-open range of images that it sees."""
    features_per_tile: int
    trim: TrimPlan
    known: list[FeatureKeyValues | None]
    """Keys and values of each image; None if none are kept."""
    stored: KeptSets | None = None
    """What an earlier prefill kept; the policy is not asked then."""
    trained: Mapping[str, Trained] = field(default_factory=dict)
    """What the model's policies have learned, by their names."""
    kept: tuple[Tensor, ...] | None = field(default=None, init=False)
    """Kept features of each image, int64, counted within the image; None if all are."""
    selection: Selection | None = field(default=None, init=False)
    """The first one; None before it, and if there is none."""
    kept_sets: KeptSets = field(default_factory=KeptSets, init=False)
    """All selections until now, to be stored."""
    trim_times: list[TrimTimes] = field(default_factory=list, init=False)
    """Of each selection."""
    layer_rows: list[tuple[int, ...]] = field(default_factory=list, init=False)
    """Rows of each image that each cross-attention layer holds, for the layers until now."""
    num_merged: tuple[int, ...] = field(default=(), init=False)
    """Merged rows of each image; empty if nothing is merged."""
    bias: Tensor | None = field(default=None, init=False)
    """float32 [rows of `features`], added to every logit of a row; None if there is no bias."""
    held_bias: NDArray[np.float32] | None = field(default=None, init=False)
    """`bias` of `held_range`, on the host."""

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Kept features of each image, without merged rows."""
        num_merged = self.num_merged or (0,) * len(self.num_held)
        return tuple(rows - merged for rows, merged in zip(self.num_held, num_merged, strict=True))

    @property
    def kept_places(self) -> Tensor:
        """Where `features` has kept features, int64, ascending."""
        return self._places()[0]

    @property
    def offsets(self) -> list[int]:
        """Where each image's rows begin in `features`, and the end of the last."""
        return [0, *accumulate(self.num_held)]

    @property
    def held_range(self) -> tuple[int, int]:
        """The rows of `features` that the last row of the prompt sees, and so every decoded row."""
        first, last = self.visible_images[-1]
        return self.offsets[first], self.offsets[last]

    @property
    def has_left(self) -> bool:
        """Whether later cross-attention layers are skipped."""
        return self.kept_sets.left_after is not None

    def visible_runs(self) -> list[tuple[int, int, int, int]]:
        """(first row, end row, first feature, end feature) of consecutive prompt rows that see the same features."""
        if self.has_left:
            return []
        offsets, images = self.offsets, self.visible_images
        num_rows = len(images)
        starts = [row for row in range(num_rows) if row == 0 or images[row] != images[row - 1]]
        runs = []
        for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
            first, last = images[start]
            if first < last:
                runs.append((start, end, offsets[first], offsets[last]))
        return runs

    def runs_of(self, first: int, end: int) -> list[Run]:
        """Runs of alike rows among those that see an image, of which the first is `first`."""
        runs, start = [], 0
        for row, end_row, first_feature, end_feature in self.visible_runs():
            stop = start + end_row - row
            num_rows = min(stop, end) - max(start, first)
            if num_rows > 0:
                runs.append(Run(num_rows, first_feature, end_feature))
            start = stop
        return runs

    def keys_values(self, layer: int, project: Project) -> Interruptible[tuple[Tensor, Tensor]]:
        """Keys and values of `features` in a cross-attention layer; yields after each image but the last.

        Args:
            layer: which.
            project: makes those that are not known.
        Returns:
            [rows of `features`, Hkv, Dh] each; nobody may change them.
        """
        pieces: list[tuple[Tensor, Tensor]] = []
        kept_of = self.kept or [None] * len(self.num_held)
        images = zip(self.features.split(self.num_held), self.num_kept, kept_of, self.known, strict=True)
        for features, num_kept, kept, known in images:
            if pieces:
                yield
            if known is not None and known.serves(layer, kept):
                pieces.append(known.rows(layer, kept, features[:num_kept], project))
                features = features[num_kept:]  # merged rows are the request's own
            if len(features):
                pieces.append(project(features))
        if len(pieces) == 1:
            return pieces[0]
        keys, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return keys, values

    def leave(self, layer: int) -> None:
        """Skip the cross-attention layers after this one."""
        self.kept_sets = KeptSets(self.kept_sets.sets, left_after=layer)

    def hold(self, selection: Selection, layer: int = AHEAD) -> tuple[Tensor, Tensor]:
        """Go on with what was selected first; the merged rows of each image come behind its kept ones.

        Args:
            selection: what is kept and merged; the weight of a merged row becomes its bias.
            layer: after which it was made.
        Returns:
            Where `features` now has the kept features and the merged rows: int64 [M] and [G], each ascending.
        """
        everything, groups = self.features, selection.groups
        starts = self.offsets[:-1]
        of_images = selection.kept.split(selection.num_kept)
        self.kept = tuple(kept - start for kept, start in zip(of_images, starts, strict=True))
        stays = everything.index_select(0, selection.kept)  # on a CPU faster than indexing
        self.selection = selection
        self.num_merged = () if groups is None else groups.num_groups
        self._note(selection, layer)
        kept, merged = self._places()
        if groups is None:
            self.features = stays
        else:
            num_rows = sum(self.num_held)
            self.features = everything.new_empty(num_rows, everything.shape[1])
            self.features.index_copy_(0, kept, stays).index_copy_(0, merged, groups.stand_for(everything))
            weights = torch.zeros(num_rows, device=everything.device)
            self._weigh(weights.index_copy_(0, merged, groups.sizes.float().log()))
        return kept, merged

    def hold_fewer(self, selection: Selection, layer: int) -> Tensor:
        """Go on with some of the kept features; merged rows all stay.

        Args:
            selection: counts `kept_places`, and merges nothing.
            layer: after which it was made.
        Returns:
            Which rows of `features` stay, int64, ascending.
        """
        assert self.kept is not None, "something was selected first"
        kept, merged = self._places()
        rows = torch.cat([kept[selection.kept], merged]).sort().values
        starts = [0, *accumulate(self.num_kept)][:-1]
        of_images = zip(self.kept, selection.kept.split(selection.num_kept), starts, strict=True)
        self.kept = tuple(before[places - start] for before, places, start in of_images)
        self.features = self.features[rows]
        self._note(selection, layer)
        self._weigh(None if self.bias is None else self.bias[rows])
        return rows

    def _note(self, selection: Selection, layer: int) -> None:
        num_merged = self.num_merged or (0,) * len(selection.num_kept)
        self.num_held = tuple(map(sum, zip(selection.num_kept, num_merged, strict=True)))
        self.kept_sets = KeptSets((*self.kept_sets.sets, KeptSet.of(selection, layer)), self.kept_sets.left_after)

    def _weigh(self, bias: Tensor | None) -> None:
        first, end = self.held_range
        self.bias = bias
        self.held_bias = None if bias is None else bias[first:end].cpu().numpy()

    def _places(self) -> tuple[Tensor, Tensor]:
        """Where `features` has kept features and merged rows: int64, each ascending."""
        num_merged = self.num_merged or (0,) * len(self.num_held)
        counts = [n for of_image in zip(self.num_kept, num_merged, strict=True) for n in of_image]
        runs = torch.arange(sum(counts), device=self.features.device).split(counts)
        return torch.cat(runs[::2]), torch.cat(runs[1::2])
