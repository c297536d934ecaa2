"""What steps are expected to take."""

import pytest

from trimserve.engine.step_costs import StepCosts


def test_steps_between_those_that_were_seen_lie_on_a_line_and_larger_ones_are_taken_for_as_cheap() -> None:
    costs = StepCosts()
    assert costs.seconds(1) == costs.seconds(9)
    costs.saw(2, 0.5)
    costs.saw(4, 1.5)
    assert [costs.seconds(rows) for rows in (1, 2, 3, 4, 9)] == [0.5, 0.5, 1.0, 1.5, 1.5]


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    costs = StepCosts()
    costs.saw(9, 50.0)
    for _ in range(256):
        costs.saw(1, 1.0)
    assert costs.seconds(9) == 1.0


def test_one_slow_step_does_not_count_and_lasting_slowness_does() -> None:
    costs = StepCosts()
    costs.saw(1, 1.0)
    costs.saw(1, 50.0)
    assert costs.seconds(1) == pytest.approx(1.02)
    for _ in range(100):
        costs.saw(1, 3.0)
    assert costs.seconds(1) == 3.0
