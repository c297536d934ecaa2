"""The budget, the selection over heads and images, and its cap: hand-worked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimserve.models.trimming import TrimParams, bitmap, budget, select

nan = math.nan


@pytest.mark.parametrize(
    ("k_ratio", "num_features", "k"),
    [
        (0.2, 65, 13),  # 0.2 * 65 is a little more than 13 in double precision
        (0.2, 66, 14),  # 13.2
        (0.25, 1601, 401),
        (1.0, 37, 37),
        (1e-6, 1601, 1),
        (0.5, 1, 1),
    ],
)
def test_budget_rounds_up_and_stays_within_the_image(k_ratio: float, num_features: int, k: int) -> None:
    assert budget(k_ratio, num_features) == k


@given(st.floats(1e-9, 1.0), st.integers(1, 7000))
def test_budget_is_always_a_count_of_the_image(k_ratio: float, num_features: int) -> None:
    assert 1 <= budget(k_ratio, num_features) <= num_features


def test_heads_choose_apart_and_their_picks_are_united_per_image() -> None:
    scores = torch.tensor(
        [
            [0.4, 0.1, 0.3, 0.2, 0.0, 0.9],  # head 0: image 0 -> 0, 2; image 1 -> 5
            [0.1, 0.1, 0.5, 0.6, nan, 0.1],  # head 1: image 0 -> 2, 3; image 1 -> 5 (NaN is last)
        ]
    )
    selection = select(scores, (4, 2), TrimParams(k_ratio=0.5))
    assert selection.picks.tolist() == [[0, 2, 5], [2, 3, 5]]
    assert selection.kept.tolist() == [0, 2, 3, 5]
    assert selection.num_kept == (3, 1)


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        (0.5, [2, 3]),  # 2 has both heads' votes; of 0 and 3 the higher best score stays
        (0.75, [0, 2, 3]),
        (0.1, [2]),  # at least one feature stays
        (1.0, [0, 2, 3]),
    ],
)
def test_the_cap_keeps_votes_then_scores_then_lower_indices(fraction: float, kept: list[int]) -> None:
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.5, 0.6]])
    trim = TrimParams(k_ratio=0.5, max_kept_fraction=fraction)
    assert select(scores, (4,), trim).kept.tolist() == kept


def test_the_cap_breaks_full_ties_towards_the_lower_index() -> None:
    trim = TrimParams(k_ratio=1.0, max_kept_fraction=0.5)
    assert select(torch.full((3, 6), 0.25), (4, 2), trim).kept.tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("trim", "can_drop"),
    [
        (TrimParams(k_ratio=0.5), True),
        (TrimParams(k_ratio=1.0), False),
        (TrimParams(k_ratio=1.0, max_kept_fraction=0.5), True),
        (TrimParams(k_ratio=1.0, max_kept_fraction=1.0), False),
        (TrimParams(enabled=False, k_ratio=0.5), False),
    ],
)
def test_only_a_budget_below_everything_can_drop_features(trim: TrimParams, can_drop: bool) -> None:
    assert trim.can_drop is can_drop


def test_a_bitmap_has_the_least_significant_bit_first() -> None:
    assert bitmap(torch.tensor([0, 3, 9]), 10) == bytes([0b1001, 0b10])
