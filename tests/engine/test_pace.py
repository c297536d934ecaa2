"""The lower bound of a request's time."""

from trimserve.engine.pace import Pace


def test_nothing_is_too_slow_before_anything_was_seen() -> None:
    assert Pace().least_seconds(10**6, 10**6) == 0


def test_the_bound_is_of_the_fastest_prefill_and_the_fastest_step() -> None:
    pace = Pace()
    pace.saw_prefill(10, 1.0)
    pace.saw_prefill(10, 5.0)
    assert pace.least_seconds(20, 100) == 2.0
    pace.saw_step(0.5)
    pace.saw_step(0.25)
    # The first token comes with the prefill.
    assert pace.least_seconds(20, 5) == 3.0
    assert pace.least_seconds(20, 1) == 2.0
