"""The selection over heads and images, its cap and its controls: hand-worked."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trimming.policies.layers import scored
from trimserve.api.trim import FixedCount, FixedRatio, Knee, TopP, TrimRequest
from trimserve.trimming.plan import TrimPlan, bitmap, select

nan = math.nan


def test_heads_choose_apart_and_their_picks_are_united_per_image() -> None:
    scores = torch.tensor(
        [
            [0.4, 0.1, 0.3, 0.2, 0.0, 0.9],  # head 0: image 0 -> 0, 2; image 1 -> 5
            [0.1, 0.1, 0.5, 0.6, nan, 0.1],  # head 1: image 0 -> 2, 3; image 1 -> 5 (NaN is last)
        ]
    )
    selection = select(scored(scores, (4, 2)), TrimPlan.of(TrimRequest(k_ratio=0.5)))
    assert selection.picks.tolist() == [[0, 2, 5], [2, 3, 5]]
    assert selection.kept.tolist() == [0, 2, 3, 5]
    assert selection.num_kept == (3, 1)


@pytest.mark.parametrize("max_kept_fraction", [None, 0.5])
def test_the_same_is_kept_where_nobody_wants_to_know_the_picks(max_kept_fraction: float | None) -> None:
    trim = TrimPlan.of(TrimRequest(k_ratio=0.2, max_kept_fraction=max_kept_fraction))
    layer = scored(torch.rand(3, 50, generator=torch.Generator().manual_seed(0)), (30, 20))
    with_picks = select(layer, trim)
    layer.wants_picks = False
    assert torch.equal(select(layer, trim).kept, with_picks.kept)
    assert 0 < len(with_picks.kept) < 50


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
    trim = TrimPlan.of(TrimRequest(k_ratio=0.5, max_kept_fraction=fraction))
    assert select(scored(scores, (4,)), trim).kept.tolist() == kept


def test_the_cap_breaks_full_ties_towards_the_lower_index() -> None:
    trim = TrimPlan.of(TrimRequest(k_ratio=1.0, max_kept_fraction=0.5))
    assert select(scored(torch.full((3, 6), 0.25), (4, 2)), trim).kept.tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (1, [3]),  # k = 1 gives 0 and 3, one vote each
        (2, [0, 3]),
        (3, [0, 2, 3]),  # k = 2
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3]),
    ],
)
def test_a_count_takes_the_smallest_k_whose_union_reaches_it(count: int, kept: list[int]) -> None:
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.1, 0.5, 0.6]])
    assert select(scored(scores, (4,)), TrimPlan.of(TrimRequest(budget=FixedCount(count)))).kept.tolist() == kept


def test_top_p_gives_every_head_a_k_of_its_own() -> None:
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25, 0.9, 0.1]])
    selection = select(scored(scores, (4, 2)), TrimPlan.of(TrimRequest(budget=TopP(0.6))))
    assert selection.picks.tolist() == [[0, -1, -1, 4, 5], [0, 1, 2, 4, -1]]
    assert selection.kept.tolist() == [0, 1, 2, 4, 5]


def test_strided_takes_the_middle_of_equal_stretches_of_each_image() -> None:
    scores = torch.zeros(1, 14)
    scores[0, :4] = scores[0, 10] = 1.0
    selection = select(scored(scores, (10, 4)), TrimPlan.of(TrimRequest(policy="strided", k_ratio=0.4)))
    # Image 0: 4 of 10, stretches of 2.5 with middles 1.25, 3.75, 6.25, 8.75. Image 1: 2 of 4, middles 1 and 3.
    assert selection.kept.tolist() == [1, 3, 6, 8, 11, 13]
    assert selection.num_kept == (4, 2)


def test_random_draws_by_image_index_size_and_count_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    trim = TrimPlan.of(TrimRequest(policy="random", k_ratio=0.3))
    first, second = (select(scored(torch.rand(1, 40, generator=rng), (20, 20)), trim) for _ in range(2))
    assert first.kept.tolist() == second.kept.tolist()
    # Written down once: a later version that draws otherwise would make reports incomparable.
    assert first.kept.tolist() == [2, 7, 13, 14, 16, 17, 21, 22, 28, 31, 32, 39]


def test_random_draws_every_feature_alike() -> None:
    drawn = torch.zeros(8)
    for size in range(8, 1208):  # another size, another seed; the first 8 of `size` features are counted
        kept = select(scored(torch.rand(1, size), (size,)), TrimPlan.of(TrimRequest(policy="random", k_ratio=0.5))).kept
        drawn += torch.bincount(kept, minlength=size)[:8] > 0
    assert (drawn / 1200 - 0.5).abs().max() < 0.06  # four standard deviations


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.floats(0.01, 0.99),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.integers(0, 2**31),
)
def test_controls_keep_of_each_image_as_many_features_as_trimmed(
    num_features: list[int], k_ratio: float, cap: float | None, seed: int
) -> None:
    scores = torch.rand(4, sum(num_features), generator=torch.Generator().manual_seed(seed))
    request = TrimRequest(k_ratio=k_ratio, max_kept_fraction=cap)
    trimmed, *controls = (
        select(scored(scores, num_features), TrimPlan.of(replace(request, policy=policy)))
        for policy in ("trimmed", "random", "strided")
    )
    for control in controls:
        assert control.num_kept == trimmed.num_kept
        assert control.picks.shape == (0, 0)
        start = kept = 0
        for n, count in zip(num_features, trimmed.num_kept, strict=True):
            piece = control.kept[kept : kept + count]
            assert piece.tolist() == sorted({*piece.tolist()})
            assert start <= piece[0]
            assert piece[-1] < start + n
            start, kept = start + n, kept + count


@pytest.mark.parametrize(
    ("trim", "can_drop"),
    [
        (TrimRequest(k_ratio=0.5), True),
        (TrimRequest(k_ratio=1.0), False),
        (TrimRequest(k_ratio=1.0, max_kept_fraction=0.5), True),
        (TrimRequest(k_ratio=1.0, max_kept_fraction=1.0), False),
        (TrimRequest(enabled=False, k_ratio=0.5), False),
        (TrimRequest(k_ratio=0.5, budget=FixedRatio(1.0)), False),
        (TrimRequest(k_ratio=0.5, budget=TopP(1.0)), False),
        (TrimRequest(k_ratio=1.0, budget=FixedRatio(0.9)), True),
        (TrimRequest(k_ratio=1.0, budget=FixedCount(1)), True),
        (TrimRequest(k_ratio=1.0, budget=Knee()), True),
        (TrimRequest(policy="sparsevlm", k_ratio=1.0, parameters={"cascade_ratio": 0.9}), True),
        (TrimRequest(policy="sparsevlm", k_ratio=1.0, parameters={"cascade_ratio": 1.0}), False),
        (TrimRequest(policy="todre", budget=FixedRatio(1.0), parameters={"late_exit_threshold": 0.1}), True),
        (TrimRequest(policy="todre", budget=FixedRatio(1.0), parameters={"late_exit_threshold": 0.0}), False),
    ],
)
def test_only_a_budget_below_everything_can_drop_features(trim: TrimRequest, can_drop: bool) -> None:
    assert (TrimPlan.of(trim).policy is not None) is can_drop


def test_a_bitmap_has_the_least_significant_bit_first() -> None:
    assert bitmap(torch.tensor([0, 3, 9]), 10) == bytes([0b1001, 0b10])
