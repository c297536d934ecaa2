"""union_indices: tables by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, seeded
from tests.ops.refusals import refusing
from trimserve.ops import reference, union_indices

pytestmark = pytest.mark.usefixtures("device")

TABLE: list[tuple[list[list[int]], int, list[int], int]] = [  # picks, num_features, kept, num_kept
    ([[1, 3], [0, 3]], 6, [0, 1, 3, -1], 3),
    ([[1, 3], [0, 3]], 4, [0, 1, 3, -1], 3),
    ([[2, 0], [1, 2]], 3, [0, 1, 2], 3),  # all kept: no tail; order of picks does not matter
    ([[4]], 5, [4], 1),
    ([[0], [0], [0]], 2, [0, -1], 1),
    ([[0], [0], [0]], 1, [0], 1),
    ([[], []], 3, [], 0),
    ([], 3, [], 0),
    ([[]], 0, [], 0),
]


@pytest.mark.parametrize("op", [union_indices, reference.union_indices])
@pytest.mark.parametrize(("picks", "num_features", "kept", "num_kept"), TABLE)
def test_hand_worked_unions(
    picks: list[list[int]],
    num_features: int,
    kept: list[int],
    num_kept: int,
    op: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    result, count = op(torch.tensor(picks, dtype=torch.int64).view(len(picks), -1 if any(picks) else 0), num_features)
    assert (result.dtype, count.dtype, count.shape) == (torch.int64, torch.int64, ())
    assert result.tolist() == kept
    assert count.item() == num_kept


@given(
    num_heads=st.integers(0, 5),
    num_picks=st.integers(0, 80),
    num_features=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_picks(num_heads: int, num_picks: int, num_features: int, seed: int) -> None:
    generator = seeded(seed)
    picks = torch.randint(0, num_features, (num_heads, num_picks), generator=generator)
    kept, num_kept = union_indices(picks, num_features)
    expected_kept, expected_num_kept = reference.union_indices(picks, num_features)
    assert torch.equal(kept, expected_kept)
    assert torch.equal(num_kept, expected_num_kept)


def test_many_features_keep_their_order() -> None:
    picks = torch.randint(0, 100_000, (4, 3000), generator=seeded(0))
    kept, num_kept = union_indices(picks, 100_000)
    assert torch.equal(kept, reference.union_indices(picks, 100_000)[0])
    assert kept[num_kept:].eq(-1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    picks = torch.tensor([[1, 8, 3], [4, 1, 9]])
    assert union_indices(layout(picks), 10)[0].tolist() == [1, 3, 4, 8, 9, -1]


def test_reads_only_its_inputs() -> None:
    picks = torch.tensor([[1, 8, 3], [4, 1, 9]])
    for offset in range(9):
        view, buffer = misaligned(picks, offset, -7)  # a stray read would be refused
        before = buffer.clone()
        assert union_indices(view, 10)[0].tolist() == [1, 3, 4, 8, 9, -1]
        assert torch.equal(buffer, before)


P = torch.zeros(2, 3, dtype=torch.int64)
REFUSALS: list[tuple[tuple[Tensor, int], str]] = [
    ((P.int(), 5), "picks must be int64 [H, K], got int32 [2, 3]"),
    ((P[0], 5), "picks must be int64 [H, K], got int64 [3]"),
    ((P, -1), "num_features must be in [0, 2147483647], got -1"),
    ((P, 2**31), "num_features must be in [0, 2147483647], got 2147483648"),
]
REFUSED_VALUES: list[tuple[tuple[Tensor, int], str]] = [
    ((P, 0), "picks must be in [0, 0), got 0"),
    ((P + 5, 5), "picks must be in [0, 5), got 5"),
    ((P - 1, 5), "picks must be in [0, 5), got -1"),
]


test_refuses_with_its_reason = refusing(union_indices, REFUSALS)
test_refuses_values_with_its_reason = refusing(union_indices, REFUSED_VALUES, "checked_values")


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.trimserve.union_indices.default, (torch.tensor([[1, 3], [0, 3]]), 6))
