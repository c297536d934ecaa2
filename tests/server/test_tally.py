"""Tallies against prometheus_client's own metrics, which a scraper must not be able to tell them from."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from trimserve.server.tally import Counts, Tallies, Tally

BOUNDS = (0.001, 0.5, 1, 2.5)


def exposition(*collectors: Tallies | Counts) -> list[str]:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return lines(registry)


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_tally_is_scraped_like_a_histogram() -> None:
    ours = Tallies("gap_seconds", "Gaps.", BOUNDS, ("trimming",), [("on",), ("off",)])
    registry = CollectorRegistry()
    theirs = Histogram("gap_seconds", "Gaps.", ("trimming",), buckets=BOUNDS, registry=registry)
    theirs.labels("off")
    for value in (0.0, 0.001, 0.25, 0.5, 1.0, 2.5, 2.6, 1e9):
        ours.labels("on").observe(value)
        theirs.labels("on").observe(value)
    assert sorted(exposition(ours)) == sorted(lines(registry))


def test_counts_are_scraped_like_a_counter() -> None:
    ours = Counts("tokens_total", "Tokens.", (), [()])
    registry = CollectorRegistry()
    theirs = Counter("tokens_total", "Tokens.", registry=registry)
    for amount in (1, 3):
        ours.labels().inc(amount)
        theirs.inc(amount)
    assert exposition(ours) == lines(registry)


def test_a_value_that_came_several_times_is_counted_as_often() -> None:
    once, often = Tally(BOUNDS), Tally(BOUNDS)
    for _ in range(3):
        once.observe(0.25)
    often.observe(0.25, 3)
    often.observe(0.25, 0)
    assert often.read() == once.read()
