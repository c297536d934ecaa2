"""Counts of every kind of budget, hand-worked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, TopP
from trimserve.trimming.budget import Allowance, budget, counts

nan = math.nan


@pytest.mark.parametrize(
    ("ratio", "num_features", "count"),
    [
        (0.55, 100, 55),  # 55.00000000000001 in double precision
        (0.2, 65, 13),
        (0.2, 66, 14),  # 13.2
        (0.25, 1601, 401),
        (1.0, 37, 37),
        (1e-6, 1601, 1),
        (0.5, 1, 1),
    ],
)
def test_a_share_rounds_up_and_stays_within_the_image(ratio: float, num_features: int, count: int) -> None:
    assert budget(ratio, num_features) == count


@given(st.floats(1e-9, 1.0), st.integers(1, 7000))
def test_a_share_is_always_a_count_of_the_image(ratio: float, num_features: int) -> None:
    assert 1 <= budget(ratio, num_features) <= num_features


CASES: list[tuple[Budget, list[float], int]] = [
    (FixedRatio(0.5), [1, 2, 3], 2),
    (FixedCount(2), [1, 2, 3], 2),
    (FixedCount(9), [1, 2, 3], 3),  # fewer features than the budget
    (TopP(0.5), [1, 5, 2, 2], 1),
    (TopP(0.51), [1, 5, 2, 2], 2),
    (TopP(0.9), [1, 5, 2, 2], 3),
    (TopP(1.0), [1, 5, 2, 2], 4),
    (TopP(1.0), [1, 0, 0], 1),  # the rest has no mass
    (TopP(0.7), [nan, 3, -5, 1], 1),  # 3 of 4
    (TopP(0.5), [0, 0, 0], 1),
    (Knee(), [9, 1, 10, 1, 1], 2),  # 10 9 | 1 1 1
    (Knee(), [0, 10, 9, 10, 10], 4),  # 10 10 10 9 bulges: the bend, 9, stays
    (Knee(), [4, 3, 2, 1, 0], 1),  # a straight line: all before it, but one
    (Knee(), [2, 2, 2], 3),  # no bend
    (Knee(), [nan, 10, 1, 9, 1], 2),
    (Knee(), [nan, nan], 2),
    (Knee(), [5], 1),
]


@pytest.mark.parametrize(("asked", "scores", "count"), CASES)
def test_scores_decide_how_many_stay(asked: Budget, scores: list[float], count: int) -> None:
    assert Allowance(asked).count(torch.tensor(scores, dtype=torch.float32)) == count


def test_each_row_of_scores_counts_for_itself() -> None:
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert counts(TopP(0.6), scores) == [1, 3]
    assert counts(Knee(), scores) == [1, 4]


def test_a_cap_bounds_every_budget_from_above_and_leaves_one() -> None:
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for asked in (FixedRatio(1.0), FixedCount(4), TopP(1.0)):
        assert Allowance(asked, 0.6).count(scores) == 2
        assert Allowance(asked, 0.01).count(scores) == 1
