"""Items and exchanges without a server."""

import pytest

from benchmarks.load import Answer, Exchange
from benchmarks.workload import Item, Kind


class Maker:
    """Makes what tests need with few words."""

    def item(self, index: int = 0, kind: Kind = "text", *, is_repeated: bool = False) -> Item:
        return Item(index, kind, "What?", () if kind == "text" else (b"image",), is_repeated)

    def exchange(
        self, sent: float, *arrivals: float, item: Item | None = None, token_ids: tuple[int, ...] | None = None
    ) -> Exchange:
        """One token with each arrival, the end with the last."""
        tokens = tuple(range(len(arrivals))) if token_ids is None else token_ids
        answer = Answer(arrivals, len(tokens), 10, tokens, num_valid=100, num_kept=50)
        return Exchange(item or self.item(), sent, arrivals[-1], answer)

    def failure(self, sent: float, finished: float) -> Exchange:
        return Exchange(self.item(), sent, finished, Answer(error="UNAVAILABLE: gone"))


@pytest.fixture
def make() -> Maker:
    return Maker()
