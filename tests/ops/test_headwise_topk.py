"""headwise_topk: tables by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, seeded, threads
from tests.ops.refusals import refusing
from trimserve.ops import headwise_topk, reference

pytestmark = pytest.mark.usefixtures("device")

TABLE = [  # one head's scores, segments, k, picks
    ([3.0, 1.0, 2.0], [3], [2], [0, 2]),
    ([3.0, 1.0, 2.0], [3], [3], [0, 1, 2]),
    ([1.0], [1], [1], [0]),
    ([5.0, 5.0, 5.0], [3], [2], [0, 1]),  # tie: lower index
    ([1.0, 5.0, 2.0, 5.0, 5.0], [5], [2], [1, 3]),
    ([0.0, -0.0, 0.0], [3], [2], [0, 1]),  # -0 and +0 tie
    ([-2.0, -1.0, -3.0], [3], [2], [0, 1]),
    ([nan, 1.0, -inf], [3], [1], [1]),  # NaN is last
    ([nan, 1.0, -inf], [3], [2], [1, 2]),
    ([nan, nan, nan], [3], [2], [0, 1]),
    ([1.0, inf, -inf], [3], [1], [1]),
    ([1.0, 2.0, 9.0, 8.0, 7.0], [2, 3], [1, 2], [1, 2, 3]),  # each image has its own picks
    ([1.0, 2.0, 3.0], [0, 3, 0], [0, 1, 0], [2]),
    ([], [0], [0], []),
    ([], [], [], []),
]


@pytest.mark.parametrize("op", [headwise_topk, reference.headwise_topk])
@pytest.mark.parametrize(("scores", "segments", "k", "picks"), TABLE)
def test_hand_worked_picks(
    scores: list[float],
    segments: list[int],
    k: list[int],
    picks: list[int],
    op: Callable[[Tensor, list[int], list[int]], Tensor],
) -> None:
    result = op(torch.tensor([scores]), segments, k)
    assert result.dtype == torch.int64
    assert result.tolist() == [picks]


def test_heads_pick_on_their_own() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert headwise_topk(scores, [3], [1]).tolist() == [[2], [0]]


def test_no_heads_no_picks() -> None:
    assert headwise_topk(torch.empty(0, 3), [3], [2]).shape == (0, 2)


@pytest.mark.parametrize("k", [1, 7, 320, 1601])
def test_equals_reference_at_real_size(k: int) -> None:
    scores = torch.rand(32, 3202, generator=seeded(k))
    assert torch.equal(
        headwise_topk(scores, [1601, 1601], [k, 1601 - k + 1]),
        reference.headwise_topk(scores, [1601, 1601], [k, 1601 - k + 1]),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    """Scores of few distinct values, so that ties are the rule, with NaN and infinities among them."""
    segments = draw(st.lists(st.integers(0, 70), max_size=4))
    k = [draw(st.integers(min(1, size), size)) for size in segments]
    num_heads = draw(st.integers(1, 3))
    value = st.sampled_from([nan, inf, -inf, 0.0, -0.0, 1e-45, -1e-45, 0.25, 0.5]) | st.floats(width=32)
    values = torch.tensor(draw(st.lists(value, min_size=1, max_size=12)))
    places = torch.randint(len(values), (num_heads, sum(segments)), generator=seeded(draw(st.integers(0, 2**16))))
    return values[places], segments, k


@given(cases())
def test_equals_reference_on_any_scores(case: tuple[Tensor, list[int], list[int]]) -> None:
    assert torch.equal(headwise_topk(*case), reference.headwise_topk(*case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    scores = torch.rand(3, 40, generator=seeded(0))
    assert torch.equal(headwise_topk(layout(scores), [40], [9]), headwise_topk(scores, [40], [9]))


def test_reads_only_its_inputs() -> None:
    scores = torch.rand(3, 37, generator=seeded(0))
    expected = headwise_topk(scores, [30, 7], [9, 2])
    for offset in range(18):
        view, buffer = misaligned(scores, offset, inf)  # a stray read would be picked
        before = buffer.clone()
        assert torch.equal(headwise_topk(view, [30, 7], [9, 2]), expected)
        assert torch.equal(buffer, before)


def test_any_number_of_threads_gives_the_same_picks() -> None:
    scores = torch.rand(32, 3202, generator=seeded(0)).round(decimals=2)
    alone = headwise_topk(scores, [3202], [500])
    with threads(3):
        assert torch.equal(headwise_topk(scores, [3202], [500]), alone)


S = torch.zeros(2, 5)
REFUSALS: list[tuple[tuple[Tensor, list[int], list[int]], str]] = [
    ((S.half(), [5], [1]), "scores must be float32 [H, N], got float16 [2, 5]"),
    ((S[0], [5], [1]), "scores must be float32 [H, N], got float32 [5]"),
    ((S, [5], [1, 1]), "k must have one entry per segment, got 2 for 1 segments"),
    ((S, [6, -1], [1, 0]), "segments must sum to N=5, got more"),
    ((S, [2**62, 2**62], [1, 1]), "segments must sum to N=5, got more"),
    ((S, [5, -1], [1, 0]), "segments[1] must be at least 0, got -1"),
    ((S, [2, 2], [1, 1]), "segments must sum to N=5, got 4"),
    ((S, [], []), "segments must sum to N=5, got 0"),
    ((S, [5], [0]), "k[0] must be in [1, 5] for a segment of 5 features, got 0"),
    ((S, [2, 3], [1, 4]), "k[1] must be in [1, 3] for a segment of 3 features, got 4"),
    ((S, [5, 0], [1, 1]), "k[1] must be in [0, 0] for a segment of 0 features, got 1"),
    ((S[:1, :1].expand(1, 2**31), [2**31], [1]), "N must be at most 2147483647, got 2147483648"),
]


test_refuses_with_its_reason = refusing(headwise_topk, REFUSALS)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.trimserve.headwise_topk.default, (torch.rand(4, 40), [30, 10], [9, 2]))
