"""What trimming selected of one request's images: tensors while a prefill runs, plain data to store.

What is stored (`KeptSets`) is enough to compute the sequence again without asking its policy, its guide or the order
in which requests came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve.trimming.encoded_image import Choice
from trimserve.trimming.merging import Groups

__all__ = ["AHEAD", "KeptSet", "KeptSets", "Selection"]

AHEAD = -1
"""The `KeptSet.layer` of what was selected before the decoder."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Kept features of one request's images."""

    kept: Tensor
    """int64 [M], ascending over the features of all images in order."""
    num_kept: tuple[int, ...]
    """Kept features of each image; sums to M."""
    picks: Tensor
    """int64 [H, K], what each query head picked, -1 where it picked fewer; [0, 0] if no head was asked or nobody
    wants to know."""
    groups: Groups | None = None
    """What is merged; None if the rest is dropped."""

    @classmethod
    def of(cls, choices: Sequence[Choice], num_features: Sequence[int]) -> "Selection":
        """Put the choices for a request's images together.

        Args:
            choices: of one policy, one for each image, at least one.
            num_features: of each image.
        """
        starts = [0, *accumulate(num_features)][:-1]
        placed = list(zip(choices, starts, strict=True))
        kept = torch.cat([start + choice.kept for choice, start in placed])
        by_head = [
            torch.where(each.picks < 0, -1, start + each.picks) for each, start in placed if each.picks is not None
        ]
        groups = [(each.groups, start) for each, start in placed if each.groups is not None]
        return cls(
            kept,
            tuple(len(choice.kept) for choice in choices),
            torch.cat(by_head, dim=1) if by_head else kept.new_empty((0, 0)),
            Groups.of(groups) if groups else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class KeptSet:
    """One `Selection` without picks, as plain data."""

    layer: int
    """Cross-attention layer after which it was made, or `AHEAD`."""
    kept: NDArray[np.int64]
    """[M], ascending; counts all features, and after the first set the features that the set before it kept."""
    num_kept: tuple[int, ...]
    """Kept features of each image; sums to M."""
    members: NDArray[np.int64] | None = None
    """Merged features, see `Groups.members`; None if nothing was merged."""
    sizes: NDArray[np.int64] | None = None
    """See `Groups.sizes`; None if nothing was merged."""
    num_groups: tuple[int, ...] = ()
    """See `Groups.num_groups`; empty if nothing was merged."""
    rows: NDArray[np.float32] | None = None
    """See `Groups.rows`; numpy has no bfloat16, and every float that rows may be is one of these."""

    @classmethod
    def of(cls, selection: Selection, layer: int) -> "KeptSet":
        """Copy a selection to the host."""
        kept, groups = _array(selection.kept), selection.groups
        if groups is None:
            return cls(layer, kept, selection.num_kept)
        rows = None if groups.rows is None else groups.rows.float().cpu().numpy()
        members, sizes = _array(groups.members), _array(groups.sizes)
        return cls(layer, kept, selection.num_kept, members, sizes, groups.num_groups, rows)

    def selection(self, device: torch.device) -> Selection:
        """The selection again, on a device and without picks."""
        kept = torch.from_numpy(self.kept).to(device)
        groups = None
        if self.members is not None and self.sizes is not None:
            members, sizes = (torch.from_numpy(each).to(device) for each in (self.members, self.sizes))
            rows = None if self.rows is None else torch.from_numpy(self.rows).to(device)
            groups = Groups(members, sizes, self.num_groups, rows)
        return Selection(kept, self.num_kept, kept.new_empty((0, 0)), groups)


@dataclass(frozen=True, slots=True, eq=False)
class KeptSets:
    """Everything that was selected in one prefill, in order; empty if every layer held everything."""

    sets: tuple[KeptSet, ...] = ()
    left_after: int | None = None
    """Cross-attention layer after which the later ones were skipped; None if none was."""

    def made_after(self, layer: int) -> KeptSet | None:
        """The set made after a cross-attention layer (or `AHEAD`), if there is one."""
        return next((each for each in self.sets if each.layer == layer), None)


def _array(indices: Tensor) -> NDArray[np.int64]:
    array: NDArray[np.int64] = indices.cpu().numpy().copy()
    return array
