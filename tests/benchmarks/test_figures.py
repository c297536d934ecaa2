"""What exchanges come to, on examples worked by hand."""

from benchmarks.load import num_equal_answers, percentiles, summary
from tests.benchmarks.conftest import Maker


def test_percentiles_lie_between_samples() -> None:
    assert percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([1.0, 2.0]) == {"p50": 1.5, "p90": 1.9, "p99": 1.99}


def test_nothing_has_no_percentiles() -> None:
    assert percentiles([]) is None


def test_rates_span_from_the_first_request_to_the_last_answer(make: Maker) -> None:
    found = summary([make.exchange(10.0, 11.0, 12.0), make.exchange(10.5, 13.0, 14.0)])
    assert found["seconds"] == 4.0
    assert found["tokens_per_second"] == 1.0
    assert found["requests_per_second"] == 0.5
    assert found["num_tokens"] == 4
    assert found["time_to_first_token_seconds"]["p50"] == 1.75


def test_a_failed_request_is_counted_and_adds_no_tokens(make: Maker) -> None:
    found = summary([make.exchange(0.0, 1.0, 2.0), make.failure(0.0, 4.0)])
    assert (found["num_requests"], found["num_failed"], found["errors"]) == (2, 1, ["UNAVAILABLE: gone"])
    assert found["tokens_per_second"] == 0.5


def test_answers_are_equal_to_the_last_token_or_not_at_all(make: Maker) -> None:
    ours = [make.exchange(0.0, 1.0, token_ids=(1, 2, 3)), make.exchange(0.0, 1.0, token_ids=(4, 5, 6))]
    theirs = [make.exchange(0.0, 1.0, token_ids=(1, 9, 3)), make.exchange(0.0, 1.0, token_ids=(4, 5, 6))]
    assert num_equal_answers(ours, theirs) == 1
    assert num_equal_answers([make.failure(0.0, 1.0)], [make.failure(0.0, 1.0)]) == 0
