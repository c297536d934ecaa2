"""One pool of pages for the keys and values of every running sequence, and the account of their bytes.

    capacity = used + free, in whole pages, after any history

Self- and cross-attention draw from the same pages (`model/key_values.py`), so there is no split to tune: what
trimming frees is room for another request. A sequence takes its pages when it is admitted: for its prompt and its
`max_new_tokens` (ADR-0003), and for the most visual features that trimming can leave; what the prefill did not use is
given back. It knows nothing about requests.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.model import huge_pages
from trimserve.model.key_values import KeyValues, Tables, layers_per_page, num_pages
from trimserve.ops import PAGE_POSITIONS

__all__ = ["KVPool", "PoolExhausted", "SequenceKV"]

_NUMBERS = count()
"""For `KeyValues.key`."""


class PoolExhausted(Exception):
    """More pages were asked for than are free. Admission asks first, so this is a mistake of ours."""


class KVPool:
    """Hands out pages and takes them back."""

    def __init__(self, info: ModelInfo, capacity_bytes: int, wanted_layers: int | None = None) -> None:
        """Allocate all pages; on the CPU memory is only taken once a page is written.

        Args:
            info: geometry, dtype and device.
            capacity_bytes: of all pages; what is less than a page is left out. One page is held beside them, for rows
                that pad a batch.
            wanted_layers: of a page; None: as many as there can be.
        Raises:
            MemoryError, RuntimeError, torch.OutOfMemoryError: they cannot be allocated.
            ValueError: so many layers cannot share a page.
        """
        self._info = info
        num_self, num_cross = info.num_self_attention_layers, info.num_cross_attention_layers
        self._layers = layers_per_page(num_self, num_cross, wanted_layers)
        self._self_groups = num_self // self._layers
        self._cross_groups = num_cross // self._layers
        self.page_bytes = PAGE_POSITIONS * self._layers * info.kv_bytes_per_position
        """Bytes of one page."""
        self.num_pages = max(0, capacity_bytes // self.page_bytes)
        """Pages that there are."""
        shape = (self.num_pages + 1, self._layers, 2, info.num_kv_heads, PAGE_POSITIONS, info.head_dim)
        self.pages: Tensor = huge_pages.empty(shape, getattr(torch, info.dtype), torch.device(info.device))
        """[P, G, 2, Hkv, 16, Dh], P one more than `num_pages`: nobody gets the last."""
        # Last freed, first used: it may still be in a cache.
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._self_pages = self._cross_pages = 0

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def used_self_bytes(self) -> int:
        """Bytes of the pages of self-attention."""
        return self._self_pages * self.page_bytes

    @property
    def used_cross_bytes(self) -> int:
        """Bytes of the pages of cross-attention."""
        return self._cross_pages * self.page_bytes

    def self_pages(self, num_positions: int) -> int:
        """Pages that `num_positions` text positions take over all self-attention layers."""
        return self._self_groups * num_pages(num_positions)

    def cross_pages(self, num_rows: int) -> int:
        """Pages that `num_rows` visual features take over all cross-attention layers."""
        return self._cross_groups * num_pages(num_rows)

    def pages_of_groups(self, layer_rows: Sequence[int]) -> list[int]:
        """Pages of each group of cross-attention layers that hold these rows, no layer more than the one before it."""
        return [num_pages(num_rows) for num_rows in layer_rows[:: self._layers]]

    def self_bytes(self, num_positions: int) -> int:
        """Bytes of `self_pages`."""
        return self.self_pages(num_positions) * self.page_bytes

    def cross_bytes(self, num_rows: int) -> int:
        """Bytes of `cross_pages`."""
        return self.cross_pages(num_rows) * self.page_bytes

    def layered_cross_bytes(self, layer_rows: Sequence[int]) -> int:
        """Bytes of `pages_of_groups`."""
        return sum(self.pages_of_groups(layer_rows)) * self.page_bytes

    def allocate(self, max_positions: int, max_cross_rows: int = 0) -> "SequenceKV":
        """Take the pages of one sequence.

        Args:
            max_positions: prompt and generated tokens, at least 1.
            max_cross_rows: most visual features that its cross-attention layers hold.
        Raises:
            PoolExhausted: there are not as many free pages.
        """
        groups, pages = self._self_groups, num_pages(max_positions)
        taken = self._take(groups * pages + self.cross_pages(max_cross_rows))
        self_tables, cross_tables = (
            each.reshape(groups, -1)
            for each, groups in zip(np.split(taken, [groups * pages]), (groups, self._cross_groups), strict=True)
        )
        self._self_pages += self_tables.size
        self._cross_pages += cross_tables.size
        return SequenceKV(self, self_tables, cross_tables, self._info.num_cross_attention_layers)

    def give_back(self, self_pages: Sequence[int], cross_pages: Sequence[int]) -> None:
        """Free pages of a sequence; they must be its own, and it must not use them any more."""
        self._self_pages -= len(self_pages)
        self._cross_pages -= len(cross_pages)
        self._free.extend(self_pages)
        self._free.extend(cross_pages)

    def _take(self, wanted: int) -> NDArray[np.int32]:
        if wanted > len(self._free):
            raise PoolExhausted(f"{wanted} pages are wanted, {len(self._free)} of {self.num_pages} are free")
        first = len(self._free) - wanted
        taken, self._free[first:] = self._free[first:], []
        return np.array(taken, dtype=np.int32)


class SequenceKV(KeyValues):
    """Keys and values of one sequence, in pages of a pool."""

    def __init__(self, pool: KVPool, self_tables: Tables, cross_tables: Tables, num_cross_layers: int) -> None:
        """Use `KVPool.allocate`."""
        lengths, biases = [0] * num_cross_layers, [None] * num_cross_layers
        super().__init__(pool.pages, self_tables, cross_tables, lengths, [*biases], (next(_NUMBERS), 0))
        self._pool = pool
        self._is_released = False
        self._cross_counts = [cross_tables.shape[1]] * len(cross_tables)
        """Pages of each group that it still owns."""

    @property
    def cross_length(self) -> int:
        """Rows that the first cross-attention layer holds."""
        return max(self.cross_lengths, default=0)

    @property
    def self_bytes(self) -> int:
        """Bytes of self-attention KV, whole pages."""
        return self.self_tables.size * self._pool.page_bytes

    @property
    def cross_bytes(self) -> int:
        """Bytes of cross-attention KV, whole pages."""
        return sum(self._cross_counts) * self._pool.page_bytes

    def give_back_unused(self) -> None:
        """Give back the pages of visual features that the prefill left unused."""
        held = self._cross_pages()
        self._cross_counts = self._pool.pages_of_groups(self.cross_lengths)
        self._pool.give_back([], [*{*held}.difference(self._cross_pages())])

    def release(self) -> None:
        """Give all pages back; a second call does nothing."""
        if not self._is_released:
            self._is_released = True
            self._pool.give_back(self.self_tables.ravel().tolist(), self._cross_pages())

    def _cross_pages(self) -> list[int]:
        tables = zip(self.cross_tables, self._cross_counts, strict=True)
        return [page for table, count in tables for page in table[:count].tolist()]
