"""Declares metrics on a registry, and remembers what was declared for the documentation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from trimserve.server.tally import Counts, Tallies

__all__ = ["Declarations", "Declared", "Labels"]

Labels = Mapping[str, tuple[str, ...]]
"""Label names and their known values; no values if they are known only at run time."""

M = TypeVar("M", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric, for the documentation."""

    name: str
    """In the exposition, without the suffixes of a histogram."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels
    buckets: tuple[float, ...] = ()


class Declarations:
    """Metrics on a registry of their own. Series of known label values exist from the start, at 0."""

    def __init__(self) -> None:
        """Declare nothing yet."""
        self.registry = _Registry(auto_describe=True)
        self.declared: list[Declared] = []
        """In the order of declaration."""

    def _counter(self, name: str, text: str, labels: Labels | None = None) -> Counter:
        self.declared.append(Declared(name, "counter", text, labels or {}))
        return _at_zero(Counter(name, text, tuple(labels or ()), registry=self.registry), labels)

    def _gauge(self, name: str, text: str, labels: Labels | None = None) -> Gauge:
        self.declared.append(Declared(name, "gauge", text, labels or {}))
        return _at_zero(Gauge(name, text, tuple(labels or ()), registry=self.registry), labels)

    def _histogram(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        labels: Labels | None = None,
    ) -> Histogram:
        self.declared.append(Declared(name, "histogram", text, labels or {}, buckets))
        histogram = Histogram(name, text, tuple(labels or ()), buckets=buckets, registry=self.registry)
        return _at_zero(histogram, labels)

    def _counts(
        self, name: str, text: str, label_names: tuple[str, ...], label_values: Sequence[tuple[str, ...]]
    ) -> Counts:
        self.declared.append(Declared(name, "counter", text, dict.fromkeys(label_names, ())))
        counts = Counts(name, text, label_names, label_values)
        self.registry.register(counts)
        return counts

    def _tallies(self, name: str, text: str, buckets: tuple[float, ...], labels: Labels | None = None) -> Tallies:
        labels = labels or {}
        self.declared.append(Declared(name, "histogram", text, labels, buckets))
        histogram = Tallies(name, text, buckets, tuple(labels), list(product(*labels.values())))
        self.registry.register(histogram)
        return histogram


class _Registry(CollectorRegistry):
    """Omits `_created`, a second series for every counter and histogram that no dashboard reads.

    prometheus_client can disable it only for the whole process, which may belong to another program.
    """

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _at_zero(metric: M, labels: Labels | None) -> M:
    """Create the series of every combination of known label values."""
    for values in product(*labels.values()) if labels else ():
        metric.labels(*values)
    return metric
