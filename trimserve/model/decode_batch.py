"""Sequences that decode together: what of them stays the same from step to step is made once."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimserve.model.key_values import BatchTables, FeatureTables, KeyValues

__all__ = ["DecodeBatch"]


class DecodeBatch:
    """Some sequences, those that see images in more layers first, so that cross-attention takes the first rows."""

    def __init__(self, kvs: Sequence[KeyValues], on_end: Callable[[], None]) -> None:
        """Take down where the sequences lie; they may grow.

        Args:
            kvs: [B], after their prefills; not kept alive.
            on_end: called when one of them is gone. Whatever keeps this object keeps their pages, so let go of it then.
        """
        self._sequences = [weakref.ref(kv, lambda _: on_end()) for kv in kvs]
        rows = range(len(kvs))
        num_layers = [sum(length > 0 for length in kv.cross_lengths) for kv in kvs]
        self._order = sorted(rows, key=lambda row: -num_layers[row])
        is_ordered = self._order == [*rows]
        self._index = None if is_ordered else torch.tensor(self._order, device=kvs[0].pages.device)
        ordered = [kvs[row] for row in self._order]
        num_seeing = len(kvs) - num_layers.count(0)
        self._text = BatchTables.of_text(ordered)
        self.features = FeatureTables.of(ordered[:num_seeing]) if num_seeing else None
        """Of those that hold visual features."""

    def is_of(self, kvs: Sequence[KeyValues]) -> bool:
        """Whether these are the sequences, in the order given."""
        return len(kvs) == len(self._sequences) and all(
            sequence() is kv for sequence, kv in zip(self._sequences, kvs, strict=True)
        )

    def lengths(self, kvs: Sequence[KeyValues]) -> list[int]:
        """Text positions that each of the sequences holds now, in our order."""
        return [kvs[row].length for row in self._order]

    def text(self, lengths: Sequence[int]) -> BatchTables:
        """Tables for one more position than `lengths` of each, in our order."""
        return self._text.at([length + 1 for length in lengths])

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows [B, ...] of the sequences as given, in our order."""
        return rows if self._index is None else rows[self._index]

    def as_given(self, rows: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return rows if self._index is None else torch.empty_like(rows).index_copy_(0, self._index, rows)
