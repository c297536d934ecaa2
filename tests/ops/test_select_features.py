"""select_features: tables by hand, equality with the two ops that it joins, edges, refusals."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, seeded, threads
from tests.ops.refusals import refusing
from tests.ops.test_headwise_topk import cases
from trimserve.ops import headwise_topk, reference, select_features, union_indices

pytestmark = pytest.mark.usefixtures("device")

TABLE = [  # scores, segments, k, kept, num_kept
    ([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [3], [1], [0, 2], 2),
    ([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]], [3], [1], [0, -1], 1),
    ([[5.0, 5.0, 5.0]], [3], [2], [0, 1], 2),  # tie: lower index
    ([[5.0, 5.0, 5.0], [1.0, 5.0, 5.0]], [3], [2], [0, 1, 2], 3),
    ([[nan, 1.0, -inf]], [3], [2], [1, 2], 2),  # NaN is last
    ([[nan, nan, nan]], [3], [1], [0], 1),
    ([[0.0, -0.0, 0.0]], [3], [2], [0, 1], 2),  # -0 and +0 tie
    ([[1.0, 2.0, 9.0, 8.0, 7.0]], [2, 3], [1, 2], [1, 2, 3], 3),  # each image has its own
    ([[1.0, 2.0, 3.0]], [0, 3, 0], [0, 1, 0], [2], 1),
    ([[]], [0], [0], [], 0),
    ([[]], [], [], [], 0),
]


@pytest.mark.parametrize("op", [select_features, reference.select_features])
@pytest.mark.parametrize(("scores", "segments", "k", "kept", "num_kept"), TABLE)
def test_hand_worked_selections(
    scores: list[list[float]],
    segments: list[int],
    k: list[int],
    kept: list[int],
    num_kept: int,
    op: Callable[[Tensor, list[int], list[int]], tuple[Tensor, Tensor]],
) -> None:
    result, count = op(torch.tensor(scores), segments, k)
    assert (result.dtype, count.dtype, count.shape) == (torch.int64, torch.int64, ())
    assert result.tolist() == kept
    assert count.item() == num_kept


@given(cases())
def test_equals_the_two_ops_on_any_scores(case: tuple[Tensor, list[int], list[int]]) -> None:
    results = select_features(*case)
    assert all(map(torch.equal, results, union_indices(headwise_topk(*case), case[0].shape[1])))
    assert all(map(torch.equal, results, reference.select_features(*case)))


def test_no_heads_keep_nothing() -> None:
    kept, num_kept = select_features(torch.empty(0, 3), [3], [2])
    assert kept.shape == (0,)
    assert num_kept.item() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    scores = torch.rand(3, 40, generator=seeded(0))
    assert torch.equal(select_features(layout(scores), [40], [9])[0], select_features(scores, [40], [9])[0])


def test_reads_only_its_inputs() -> None:
    scores = torch.rand(3, 37, generator=seeded(0))
    expected = select_features(scores, [30, 7], [9, 2])[0]
    for offset in range(18):
        view, buffer = misaligned(scores, offset, inf)  # a stray read would be kept
        before = buffer.clone()
        assert torch.equal(select_features(view, [30, 7], [9, 2])[0], expected)
        assert torch.equal(buffer, before)


@pytest.mark.parametrize("segments", [[3202], [1601, 1601], [1, 3000, 201]])
def test_any_number_of_threads_keeps_the_same(segments: list[int]) -> None:
    scores = torch.rand(32, 3202, generator=seeded(0)).round(decimals=2)
    k = [max(1, size // 6) for size in segments]
    alone = select_features(scores, segments, k)[0]
    assert torch.equal(alone, reference.select_features(scores, segments, k)[0])
    with threads(3):
        assert torch.equal(select_features(scores, segments, k)[0], alone)


S = torch.zeros(2, 5)
REFUSALS: list[tuple[tuple[Tensor, list[int], list[int]], str]] = [
    ((S.half(), [5], [1]), "scores must be float32 [H, N], got float16 [2, 5]"),
    ((S[0], [5], [1]), "scores must be float32 [H, N], got float32 [5]"),
    ((S, [5], [1, 1]), "k must have one entry per segment, got 2 for 1 segments"),
    ((S, [2, 2], [1, 1]), "segments must sum to N=5, got 4"),
    ((S, [5], [6]), "k[0] must be in [1, 5] for a segment of 5 features, got 6"),
    ((torch.zeros(1, 1).expand(1, 2**31), [2**31], [1]), "N must be at most 2147483647, got 2147483648"),
]


test_refuses_with_its_reason = refusing(select_features, REFUSALS)


def test_opcheck() -> None:
    arguments = torch.rand(4, 40, generator=seeded(0)), [30, 10], [9, 2]
    torch.library.opcheck(torch.ops.trimserve.select_features.default, arguments)
