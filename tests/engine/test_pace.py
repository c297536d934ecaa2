"""The lower bound of a request's time."""

from trimserve.engine.pace import Pace


def test_nothing_is_too_slow_before_anything_was_seen() -> None:
    assert Pace().least_seconds(10**6, 10**6) == 0


def test_the_bound_is_of_the_fastest_prefill_and_the_fastest_step() -> None:
    pace = Pace()
    pace.saw_prefill(10, 1.0)
    pace.saw_prefill(10, 5.0)
    assert pace.least_seconds(10, 100) == 1.0
    pace.saw_token(0.5)
    pace.saw_token(0.25)
    # The first token comes with the prefill.
    assert pace.least_seconds(10, 5) == 2.0
    assert pace.least_seconds(10, 1) == 1.0


def test_a_small_prefill_says_nothing_about_the_cost_of_a_row() -> None:
    # Most of a small one is what every prefill costs.
    pace = Pace()
    pace.saw_prefill(10, 1.0)
    assert pace.least_seconds(1000, 1) == 1.0


def test_a_prefill_says_nothing_about_smaller_ones_but_that_they_are_no_slower() -> None:
    pace = Pace()
    pace.saw_prefill(1000, 2.0)
    assert pace.least_seconds(999, 1) == 0.0
    pace.saw_prefill(10, 5.0)  # something was in its way
    assert pace.least_seconds(999, 1) == 0.0
    pace.saw_prefill(100, 0.5)
    assert [pace.least_seconds(rows, 1) for rows in (99, 100, 999, 1000, 5000)] == [0.0, 0.5, 0.5, 2.0, 2.0]
    pace.saw_prefill(2000, 0.4)
    assert [pace.least_seconds(rows, 1) for rows in (1000, 2000)] == [0.0, 0.4]
