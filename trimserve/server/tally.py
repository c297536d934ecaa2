"""Counters and histograms of what happens with every token, in plain Python: no lock, no label lookup, one bisection.

prometheus_client's own take a microsecond and more each, which every token of a batch would pay. The price: each series
has one writer, and a scrape may come between two values of it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Count", "Counts", "Tallies", "Tally"]


class Count:
    """One series of a counter; only one thread adds."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        """Start at 0."""
        self.value = 0
        """What was counted."""

    def inc(self, amount: int = 1) -> None:
        """Add an amount, at least 0."""
        self.value += amount


class Counts(Collector):
    """A counter, a `Count` for each combination of label values; all are there from the start."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], label_values: Iterable[tuple[str, ...]]
    ) -> None:
        """Declare it.

        Args:
            name: as it is scraped.
            text: its meaning.
            label_names: of every series.
            label_values: of each series.
        """
        self._name = name
        self._text = text
        self._label_names = label_names
        self._counts = {values: Count() for values in label_values}

    def labels(self, *values: str) -> Count:
        """The series of these label values, which are declared ones."""
        return self._counts[values]

    def collect(self) -> Iterable[Metric]:
        """What a scrape shows."""
        family = CounterMetricFamily(self._name, self._text, labels=self._label_names)
        for values, count in self._counts.items():
            family.add_metric(values, count.value)
        yield family


class Tally:
    """One series of a histogram; only one thread observes."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start empty.

        Args:
            bounds: upper ends of the buckets, ascending, without infinity.
        """
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value.

        Args:
            value: what was measured.
            times: how often it was, at least 0.
        """
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> tuple[list[int], float]:
        """How many values each bucket and all before it have, and the sum of all values; from any thread."""
        return list(accumulate(self._counts)), self._sum


class Tallies(Collector):
    """A histogram, a `Tally` for each combination of label values; all are there from the start."""

    def __init__(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        label_names: Sequence[str],
        label_values: Iterable[tuple[str, ...]],
    ) -> None:
        """Declare it.

        Args:
            name: as it is scraped, without suffixes.
            text: its meaning.
            bounds: see `Tally`.
            label_names: of every series.
            label_values: of each series.
        """
        self._name = name
        self._text = text
        self._label_names = label_names
        self._ends = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._tallies = {values: Tally(bounds) for values in label_values}

    def labels(self, *values: str) -> Tally:
        """The series of these label values, which are declared ones."""
        return self._tallies[values]

    def collect(self) -> Iterable[Metric]:
        """What a scrape shows."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, tally in self._tallies.items():
            counts, total = tally.read()
            family.add_metric(values, list(zip(self._ends, counts, strict=True)), total)
        yield family
