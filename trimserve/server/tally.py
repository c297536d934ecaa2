"""Counters and histograms that are updated for every token: plain Python without locks or label look-ups.

prometheus_client's own take more than a microsecond per update, for every token of a batch. The price: each series must
have a single writer, and a scrape may see a histogram between two of its values.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Count", "Counts", "Tallies", "Tally"]


class Count:
    """One series of a counter; a single thread may add to it."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        """Start at 0."""
        self.value = 0
        """The count."""

    def inc(self, amount: int = 1) -> None:
        """Add an amount, at least 0."""
        self.value += amount


class Counts(Collector):
    """A counter with a `Count` for each combination of label values; all exist from the start."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], label_values: Iterable[tuple[str, ...]]
    ) -> None:
        """Declare it.

        Args:
            name: in the exposition.
            text: its meaning.
            label_names: of every series.
            label_values: of each series.
        """
        self._name = name
        self._text = text
        self._label_names = label_names
        self._counts = {values: Count() for values in label_values}

    def labels(self, *values: str) -> Count:
        """The series of these label values, which must be declared ones."""
        return self._counts[values]

    def collect(self) -> Iterable[Metric]:
        """The samples of a scrape."""
        family = CounterMetricFamily(self._name, self._text, labels=self._label_names)
        for values, count in self._counts.items():
            family.add_metric(values, count.value)
        yield family


class Tally:
    """One series of a histogram; a single thread may observe."""

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
            value: the measurement.
            times: how often it occurred, at least 0.
        """
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> tuple[list[int], float]:
        """Cumulative counts of the buckets, and the sum of all values; from any thread."""
        return list(accumulate(self._counts)), self._sum


class Tallies(Collector):
    """A histogram with a `Tally` for each combination of label values; all exist from the start."""

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
            name: in the exposition, without suffixes.
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
        """The series of these label values, which must be declared ones."""
        return self._tallies[values]

    def collect(self) -> Iterable[Metric]:
        """The samples of a scrape."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, tally in self._tallies.items():
            counts, total = tally.read()
            family.add_metric(values, list(zip(self._ends, counts, strict=True)), total)
        yield family
