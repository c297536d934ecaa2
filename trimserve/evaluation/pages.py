"""Keys and values for a model that runs without an engine: evaluation, benchmarks and tests."""

from trimserve.api.info import ModelInfo
from trimserve.engine.kv_pool import KVPool, SequencePages
from trimserve.executor.page_memory import page_memory
from trimserve.model.key_values import KeyValues

__all__ = ["OwnKeyValues", "OwnPages"]


class OwnKeyValues(KeyValues):
    """Keys and values that give their own pages back."""

    def __init__(self, memory: "OwnPages", owned: SequencePages) -> None:
        """Use `OwnPages.allocate`."""
        num_cross = memory.info.num_cross_attention_layers
        super().__init__(memory.pages, owned.self_tables, owned.cross_tables, num_cross)
        self._owned = owned

    def release(self) -> None:
        """Give the pages back; a second call does nothing."""
        self._owned.release()


class OwnPages:
    """A pool and its memory."""

    def __init__(self, info: ModelInfo, capacity_bytes: int, wanted_layers: int | None = None) -> None:
        """Allocate all pages; see `KVPool`."""
        self.info = info
        self.pool = KVPool(info, capacity_bytes, wanted_layers)
        """Who owns which page."""
        self.pages = page_memory(info, self.pool.num_pages, self.pool.layers_per_page)
        """See `page_memory`."""

    def allocate(self, max_positions: int, max_cross_rows: int) -> OwnKeyValues:
        """Take the pages of one sequence.

        Args:
            max_positions: of its text, at least 1.
            max_cross_rows: rows of visual features that it may come to hold.
        Raises:
            PoolExhausted: there are not as many free pages.
        """
        return OwnKeyValues(self, self.pool.allocate(max_positions, max_cross_rows))
