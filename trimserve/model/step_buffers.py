"""What a decode step reads, in buffers that stay where they are: a step captured once can be replayed for any batch.

A batch is padded to the next of a few sizes, its *bucket*. Padding rows have length 0, see nothing, and write to a page
that is nobody's. What changes from step to step reaches the device in one copy; tables are copied only when the batch
changes. Every cross-attention layer has lengths and a bias of its own, since later ones may hold less (ADR-0008).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.model.decode_rows import NewRows
from trimserve.model.key_values import (
    BatchTables,
    FeatureTables,
    Tables,
    num_pages,
    padded,
    slots_at,
    together,
)
from trimserve.ops import PAGE_POSITIONS

__all__ = ["StepBuffers", "StepInputs", "batch_buckets"]

_BUCKET = 8
"""Larger batches are padded to a multiple of this: fewer padding rows than a page has positions."""


def batch_buckets(max_batch: int) -> list[int]:
    """The sizes that batches are padded to, up to one that holds `max_batch` rows.

    >>> batch_buckets(20)
    [1, 2, 4, 8, 16, 24]
    """
    sizes = [1, 2, 4, *range(_BUCKET, max_batch + _BUCKET, _BUCKET)]
    return sizes[: bisect_left(sizes, max_batch) + 1]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A bucket of rows, in the buffers."""

    token_ids: Tensor
    """int64 [B], of the new rows."""
    positions: Tensor
    """int64 [B]"""
    text: BatchTables
    features: FeatureTables | None
    """Of all B rows in every layer, with length 0 where a row sees nothing; None if no row sees an image."""


class StepBuffers:
    """The buffers, for batches of up to `max_batch` rows."""

    def __init__(self, info: ModelInfo, pages: Tensor, max_batch: int) -> None:
        """Make them, for requests of any size that the model takes.

        Args:
            info: geometry and limits.
            pages: see `KeyValues.pages`.
            max_batch: at least 1.
        """
        self.pages = pages
        """Where the keys and values of every batch lie."""
        self.buckets = batch_buckets(max_batch)
        """Ascending."""
        layers, num_cross = pages.shape[1], info.num_cross_attention_layers
        self._self_groups = info.num_self_attention_layers // layers
        self._cross_groups = num_cross // layers
        self.max_positions = info.max_model_len
        """Most positions of a sequence's text."""
        most, device = self.buckets[-1], pages.device
        text_pages = num_pages(self.max_positions)
        feature_pages = num_pages(info.max_images * info.max_tiles * info.features_per_tile)
        self._rows = torch.zeros((3 + self._self_groups) * most, dtype=torch.int64, device=device)
        self._text_tables = torch.zeros(self._self_groups, most, text_pages, dtype=torch.int32, device=device)
        self._feature_tables = torch.zeros(self._cross_groups, most, feature_pages, dtype=torch.int32, device=device)
        self._feature_lengths = torch.zeros(num_cross, most, dtype=torch.int32, device=device)
        self._biases = torch.zeros(num_cross, most, feature_pages * PAGE_POSITIONS, device=device)
        self._editions: tuple[int, ...] = ()
        self._self_tables: Tables = np.empty((self._self_groups, 0, 0), dtype=np.int32)

    def inputs(self, bucket: int, *, has_features: bool) -> StepInputs:
        """The first rows of the buffers.

        Args:
            bucket: how many, one of `buckets`.
            has_features: whether any of them sees an image.
        """
        rows = self._rows_of(bucket)
        token_ids, positions, lengths = rows[:3]
        feature_lengths = self._feature_lengths[:, :bucket]
        text = BatchTables(self.pages, self._text_tables[:, :bucket], lengths.int(), rows[3:])
        of_groups = self._feature_tables[:, :bucket]
        features = FeatureTables(
            tables=tuple(of_groups[layer // self.pages.shape[1]] for layer in range(len(feature_lengths))),
            lengths=feature_lengths.unbind(),
            biases=self._biases[:, :bucket].unbind(),
        )
        return StepInputs(token_ids, positions, text, features if has_features else None)

    def fill(self, token_ids: Sequence[int] | Tensor, new: NewRows) -> tuple[int, bool]:
        """Take a step's batch; nothing waits for the device.

        Args:
            token_ids: of each row; a tensor is int64, on the device.
            new: the rows, at most the largest bucket, of sequences after their prefills.
        Returns:
            The bucket, and whether any of the rows sees an image.
        """
        size = len(new.kvs)
        bucket = next(bucket for bucket in self.buckets if bucket >= size)
        editions = new.editions
        if editions != self._editions:
            self._take(new, bucket)
            self._editions = editions
        positions = np.array(new.positions, dtype=np.int64)
        rows = self._padding(bucket)
        if not isinstance(token_ids, Tensor):
            rows[0, :size] = token_ids
        rows[1, :size] = positions
        rows[2, :size] = positions + 1
        rows[3:, :size] = slots_at(self._self_tables, positions)
        _copy(self._rows_of(bucket), rows)
        if isinstance(token_ids, Tensor):
            self._rows_of(bucket)[0, :size].copy_(token_ids)
        return bucket, any(any(kv.cross_lengths) for kv in new.kvs)

    def clear(self, bucket: int) -> None:
        """Let all rows of a bucket be padding."""
        _copy(self._rows_of(bucket), self._padding(bucket))

    def _padding(self, bucket: int) -> NDArray[np.int64]:
        """`_rows_of`, all of it padding."""
        rows = np.zeros((3 + self._self_groups, bucket), dtype=np.int64)
        rows[3:] = (len(self.pages) - 1) * PAGE_POSITIONS + np.arange(bucket) % PAGE_POSITIONS
        return rows

    def _rows_of(self, bucket: int) -> Tensor:
        """Token ids, positions, lengths and slots, int64 [3 + groups, bucket]."""
        rows = 3 + self._self_groups
        return self._rows[: rows * bucket].view(rows, bucket)

    def _take(self, new: NewRows, bucket: int) -> None:
        """Copy what stays the same from step to step."""
        kvs = new.kvs
        self._self_tables = together([kv.self_tables for kv in kvs], max(kv.self_tables.shape[1] for kv in kvs))
        _copy(_corner(self._text_tables, self._self_tables), self._self_tables)
        lengths = np.zeros((len(self._feature_lengths), bucket), dtype=np.int32)
        lengths[:, : len(kvs)] = np.transpose([kv.cross_lengths for kv in kvs])
        _copy(self._feature_lengths[:, :bucket], lengths)
        if not lengths.any():
            return
        nothing = np.empty((self._cross_groups, 0), dtype=np.int32)
        held = [kv.cross_tables if any(kv.cross_lengths) else nothing for kv in kvs]
        tables = together(held, num_pages(int(lengths.max())))
        _copy(_corner(self._feature_tables, tables), tables)
        self._biases.zero_()
        for row, kv in enumerate(kvs):
            if any(bias is not None for bias in kv.cross_biases):
                biases = padded(kv.cross_biases, max(kv.cross_lengths))
                _copy(self._biases[:, row, : biases.shape[1]], biases)


def _corner(buffer: Tensor, tables: Tables) -> Tensor:
    _, rows, width = tables.shape
    return buffer[:, :rows, :width]


def _copy(buffer: Tensor, values: NDArray[Any]) -> None:
    host = torch.from_numpy(values)
    # A copy of pageable memory would be waited for.
    buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)
