"""Keys and values for a model that runs without an engine: in evaluation, benchmarks and tests."""

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
        super().__init__(memory.pages, owned.self_tables, owned.cross_tables, [0] * num_cross, [None] * num_cross)
        self.owned = owned
        """The pages, for their account."""

    def give_back_unused(self) -> None:
        """Give back the pages that the visual features turned out not to need; after the prefill."""
        self.owned.keep_cross(self.cross_lengths)

    def release(self) -> None:
        """Give all pages back; a second call does nothing."""
        self.owned.release()


class OwnPages(KVPool):
    """A pool with its memory."""

    def __init__(self, info: ModelInfo, capacity_bytes: int) -> None:
        """Allocate all pages; see `KVPool`."""
        super().__init__(info, capacity_bytes)
        self.info = info
        """The model."""
        self.pages = page_memory(info, self.num_pages, self.layers_per_page)
        """See `page_memory`."""

    def key_values(self, max_positions: int, max_cross_rows: int = 0) -> OwnKeyValues:
        """Take the pages of one sequence.

        Args:
            max_positions: of its text, at least 1.
            max_cross_rows: rows of visual features that it may come to hold.
        Raises:
            PoolExhausted: there are not as many free pages.
        """
        return OwnKeyValues(self, self.allocate(max_positions, max_cross_rows))
