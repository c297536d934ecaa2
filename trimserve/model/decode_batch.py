"""Rows that decode together: what stays the same from step to step is made once."""

import numpy as np
import torch
from torch import Tensor

from trimserve.model.adapters import RowAdapters
from trimserve.model.decode_rows import NewRows
from trimserve.model.key_values import BatchTables, FeatureTables, slots_at, together
from trimserve.ops.upload import upload, upload_ids

__all__ = ["DecodeBatch"]


class DecodeBatch:
    """Tables of some rows, ordered so that those that see images in more layers come first.

    It remembers its sequences by key, and holds neither them nor their pages.
    """

    def __init__(self, rows: NewRows) -> None:
        """Look up where the rows' sequences lie; these may grow.

        Args:
            rows: [R], of sequences after their prefills.
        """
        kvs = rows.kvs
        device = kvs[0].pages.device
        self._editions = rows.editions
        num_layers = [sum(length > 0 for length in kv.cross_lengths) for kv in kvs]
        self._order = sorted(range(len(kvs)), key=lambda row: -num_layers[row])
        is_ordered = self._order == [*range(len(kvs))]
        self._index = None if is_ordered else upload_ids(self._order, device)
        ordered = [kvs[row] for row in self._order]
        num_seeing = len(kvs) - num_layers.count(0)
        self._known_tables = together([kv.self_tables for kv in ordered], max(kv.self_tables.shape[1] for kv in kvs))
        self._tables = upload(self._known_tables, device)
        self.features = FeatureTables.of(ordered[:num_seeing]) if num_seeing else None
        """Of the rows that see visual features."""
        self.adapters = RowAdapters.of([kv.adapter for kv in ordered], device)
        """Of the rows, in our order; None if all are the base model's."""

    def is_of(self, rows: NewRows) -> bool:
        """Whether the rows have the same sequences with the same tables, in the order given."""
        return rows.editions == self._editions

    def positions(self, rows: NewRows) -> list[int]:
        """The rows' positions, in our order."""
        return [rows.positions[row] for row in self._order]

    def text(self, pages: Tensor, positions: list[int]) -> BatchTables:
        """Tables of rows at these positions, in our order.

        Args:
            pages: see `KeyValues.pages`.
            positions: [R].
        """
        known = np.array(positions, dtype=np.int64)
        lengths = upload((known + 1).astype(np.int32), pages.device)
        slots = upload(slots_at(self._known_tables, known), pages.device)
        return BatchTables(pages, self._tables, lengths, slots)

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows [R, ...] as given, in our order."""
        return rows if self._index is None else rows[self._index]

    def as_given(self, rows: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return rows if self._index is None else torch.empty_like(rows).index_copy_(0, self._index, rows)
