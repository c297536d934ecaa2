"""Items and exchanges without a server."""

import pytest

from benchmarks.load import Answer, Exchange, Item, Kind


class Maker:
    """Makes what tests need with few words."""

    def item(self, index: int = 0, kind: Kind = "text") -> Item:
        return Item(index, kind, "What?", () if kind == "text" else (b"image",))

    def exchange(self, sent: float, *arrivals: float, token_ids: tuple[int, ...] | None = None) -> Exchange:
        """One token with each arrival, the end with the last."""
        tokens = tuple(range(len(arrivals))) if token_ids is None else token_ids
        return Exchange(self.item(), sent, arrivals[-1], Answer(arrivals, len(tokens), tokens))

    def failure(self, sent: float, finished: float) -> Exchange:
        return Exchange(self.item(), sent, finished, Answer(error="UNAVAILABLE: gone"))


@pytest.fixture
def make() -> Maker:
    return Maker()
