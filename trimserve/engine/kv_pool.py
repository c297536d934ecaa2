"""Who owns which page of the keys and values, and the account of their bytes.

    capacity = used + free, in whole pages, after any history

Self- and cross-attention draw from the same pages (`model/key_values.py`), so there is no split to tune: what
trimming frees is room for another request. A sequence gets pages for its prompt and for as many rows of visual features
as trimming can leave; once the prefill knows how many stay, it keeps those only. Pages of the text grow with it
(ADR-0013). A page may have several owners, answers to one prompt, and is free when the last one has given it back; it
counts once. Pages are numbers here: their memory is the executor's.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from trimserve.api.info import ModelInfo
from trimserve.model.key_values import Tables, layers_per_page, num_pages
from trimserve.ops import PAGE_POSITIONS

__all__ = ["KVPool", "PoolExhausted", "SequencePages"]


class PoolExhausted(Exception):
    """More pages were asked for than are free. The engine asks first, so this is a mistake of ours."""


class KVPool:
    """Hands out pages and takes them back."""

    def __init__(self, info: ModelInfo, capacity_bytes: int) -> None:
        """Start with every page free.

        Args:
            info: geometry and dtype.
            capacity_bytes: of all pages; what is less than a page is left out.
        """
        num_self, num_cross = info.num_self_attention_layers, info.num_cross_attention_layers
        self.layers_per_page = layers_per_page(num_self, num_cross)
        """Layers whose keys and values share a page."""
        self._self_groups = num_self // self.layers_per_page
        self._cross_groups = num_cross // self.layers_per_page
        self.page_bytes = PAGE_POSITIONS * self.layers_per_page * info.kv_bytes_per_position
        """Bytes of one page."""
        self.num_pages = max(0, capacity_bytes // self.page_bytes)
        """Pages that there are, numbered from 0."""
        # Last freed, first used: it may still be in a cache.
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._num_owners = [0] * self.num_pages
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
        return [num_pages(num_rows) for num_rows in layer_rows[:: self.layers_per_page]]

    def self_bytes(self, num_positions: int) -> int:
        """Bytes of `self_pages`."""
        return self.self_pages(num_positions) * self.page_bytes

    def cross_bytes(self, num_rows: int) -> int:
        """Bytes of `cross_pages`."""
        return self.cross_pages(num_rows) * self.page_bytes

    def layered_cross_bytes(self, layer_rows: Sequence[int]) -> int:
        """Bytes of `pages_of_groups`."""
        return sum(self.pages_of_groups(layer_rows)) * self.page_bytes

    def allocate(self, num_positions: int, max_cross_rows: int = 0) -> "SequencePages":
        """Take the first pages of one sequence.

        Args:
            num_positions: of its text for now, at least 1.
            max_cross_rows: rows of visual features that it may come to hold.
        Raises:
            PoolExhausted: there are not as many free pages; none is taken.
        """
        self._check_free(self.self_pages(num_positions) + self.cross_pages(max_cross_rows))
        self_tables = self._take(self._self_groups, num_pages(num_positions))
        cross_tables = self._take(self._cross_groups, num_pages(max_cross_rows))
        self._self_pages += self_tables.size
        self._cross_pages += cross_tables.size
        return SequencePages(self, self_tables, cross_tables)

    def grow(self, tables: Tables, num_positions: int) -> Tables:
        """Take further pages for a text; those that it has stay where they are.

        Args:
            tables: pages of the text, [groups, pages].
            num_positions: that it has to have room for.
        Returns:
            The longer tables.
        Raises:
            PoolExhausted: there are not as many free pages; none is taken.
        """
        missing = num_pages(num_positions) - tables.shape[1]
        self._check_free(self._self_groups * missing)
        taken = self._take(self._self_groups, missing)
        self._self_pages += taken.size
        return np.concatenate([tables, taken], axis=1)

    def own_too(self, pages: Iterable[int]) -> None:
        """Count one more owner of pages that have one."""
        for page in pages:
            self._num_owners[page] += 1

    def give_back(self, self_pages: Iterable[int], cross_pages: Iterable[int]) -> None:
        """End a sequence's ownership; those that nobody else owns are free."""
        self._self_pages -= self._disown(self_pages)
        self._cross_pages -= self._disown(cross_pages)

    def _disown(self, pages: Iterable[int]) -> int:
        """How many of the pages are free now."""
        before = len(self._free)
        for page in pages:
            self._num_owners[page] -= 1
            if not self._num_owners[page]:
                self._free.append(page)
        return len(self._free) - before

    def _check_free(self, wanted: int) -> None:
        if wanted > len(self._free):
            raise PoolExhausted(f"{wanted} pages are wanted, {len(self._free)} of {self.num_pages} are free")

    def _take(self, groups: int, pages: int) -> Tables:
        first = len(self._free) - groups * pages
        taken, self._free[first:] = self._free[first:], []
        self.own_too(taken)
        return np.array(taken, dtype=np.int32).reshape(groups, pages)


class SequencePages:
    """The pages of one sequence."""

    def __init__(self, pool: KVPool, self_tables: Tables, cross_tables: Tables) -> None:
        """Use `KVPool.allocate`."""
        self._pool = pool
        self._is_released = False
        self.self_tables = self_tables
        """Pages of the text, int32 [groups, pages]."""
        self.cross_tables = cross_tables
        """Pages of the visual features, int32 [groups, pages]; later groups may have given back their last ones."""
        self._cross_counts = [cross_tables.shape[1]] * len(cross_tables)

    @property
    def num_positions(self) -> int:
        """Positions of its text that there are pages for."""
        held: int = self.self_tables.shape[1]
        return held * PAGE_POSITIONS

    @property
    def self_bytes(self) -> int:
        """Bytes of self-attention KV, whole pages."""
        return self.self_tables.size * self._pool.page_bytes

    @property
    def cross_bytes(self) -> int:
        """Bytes of cross-attention KV, whole pages."""
        return sum(self._cross_counts) * self._pool.page_bytes

    def share(self, num_shared: int, num_positions: int) -> "SequencePages":
        """Pages of another answer to the same prompt, after the prefill: only those of its own text are taken.

        Args:
            num_shared: positions of the prompt; the last page, if these do not fill it, is not shared.
            num_positions: of its text for now, more than `num_shared`.
        Raises:
            PoolExhausted: there are not as many free pages; none is taken.
        """
        shared = self.self_tables[:, : num_shared // PAGE_POSITIONS]
        other = SequencePages(self._pool, self._pool.grow(shared, num_positions), self.cross_tables)
        other._cross_counts = [*self._cross_counts]  # of the same class
        self._pool.own_too(shared.ravel().tolist())
        self._pool.own_too(page for group in self.held_cross_pages() for page in group)
        return other

    def missing_pages(self, num_positions: int) -> int:
        """Pages that its text lacks for so many positions."""
        return max(0, self._pool.self_pages(num_positions) - self.self_tables.size)

    def grow(self, num_positions: int) -> None:
        """Take the `missing_pages`.

        Raises:
            PoolExhausted: there are not as many free pages; none is taken.
        """
        self.self_tables = self._pool.grow(self.self_tables, num_positions)

    def keep_cross(self, layer_rows: Sequence[int]) -> None:
        """Give back the pages that the visual features turned out not to need.

        Args:
            layer_rows: rows that each cross-attention layer holds, none more than the one before it.
        """
        held, self._cross_counts = self.held_cross_pages(), self._pool.pages_of_groups(layer_rows)
        kept = zip(held, self._cross_counts, strict=True)
        self._pool.give_back([], [page for pages, count in kept for page in pages[count:]])

    def held_cross_pages(self) -> list[list[int]]:
        """Pages of the visual features that it still holds, for each group of layers."""
        tables = zip(self.cross_tables, self._cross_counts, strict=True)
        return [table[:count].tolist() for table, count in tables]

    def release(self) -> None:
        """Give all pages back; a second call does nothing."""
        if not self._is_released:
            self._is_released = True
            cross = [page for group in self.held_cross_pages() for page in group]
            self._pool.give_back(self.self_tables.ravel().tolist(), cross)
