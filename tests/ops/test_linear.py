"""linear: equality with the reference, the same row in every batch, layouts, edges, refusals."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned
from tests.tolerances import LINEAR
from trimserve.ops import linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(rows: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, inputs, generator=generator).to(dtype) for size in (rows, outputs)]


@pytest.mark.parametrize("op", [linear, reference.linear])
def test_a_hand_worked_product(op: Callable[..., Tensor]) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert op(x, weight).tolist() == [[1.0, 6.0], [0.0, -0.5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 288, 192), (16, 1024, 192), (70, 33, 200), (9, 640, 3000)])
def test_equals_reference(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, outputs, inputs, dtype)
    torch.testing.assert_close(linear(x, weight), reference.linear(x, weight), **LINEAR[dtype])


@given(st.integers(0, 12), st.integers(0, 40), st.integers(0, 70), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_equals_reference_on_any_shape(rows: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = draw(rows, outputs, inputs, dtype, seed)
    torch.testing.assert_close(linear(x, weight), reference.linear(x, weight), **LINEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", range(1, 10))
def test_a_row_is_the_same_in_every_batch(num_rows: int, dtype: torch.dtype) -> None:
    x, weight = draw(9, 37, 100, dtype)
    assert torch.equal(linear(x[:num_rows], weight), linear(x, weight)[:num_rows])


def test_a_row_is_the_same_for_any_number_of_threads() -> None:
    x, weight = draw(16, 2048, 512)
    alone = linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear(x, weight), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_layout_are_read(layout: Callable[[Tensor], Tensor]) -> None:
    x, weight = draw(5, 21, 40)
    assert torch.equal(linear(layout(x), weight), linear(x, weight))


@pytest.mark.parametrize("offset", [1, 3])
def test_memory_off_its_alignment_is_read_and_nothing_beside_it(offset: int) -> None:
    x, weight = draw(6, 19, 33)
    moved, moved_weight = misaligned(x, offset, nan)[0], misaligned(weight, offset, nan)[0]
    assert torch.equal(linear(moved, moved_weight), linear(x, weight))


def test_not_finite_numbers_stay_in_their_row_and_column() -> None:
    x, weight = torch.ones(3, 20), torch.ones(5, 20)
    x[1, 7], weight[4, 2] = nan, inf
    product = linear(x, weight)
    assert product[0].tolist() == [20.0] * 4 + [inf]
    assert product[1].isnan().all()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(5, 4), r"x must be .* \[R, K\], got float32 \[2, 3, 4\]"),
        (torch.ones(2, 4, dtype=torch.float64), torch.ones(5, 4), r"x must be .* got float64 \[2, 4\]"),
        (torch.ones(2, 4), torch.ones(5, 3), r"weight must be float32 \[N, K\] like x, got float32 \[5, 3\]"),
        (torch.ones(2, 4), torch.ones(5, 4).half(), r"weight must be float32 .* got float16 \[5, 4\]"),
        (torch.ones(2, 4), torch.ones(4, 5).T, "weight must be contiguous"),
    ],
)
def test_refusals_name_what_is_wrong(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"linear: {message}"):
        linear(x, weight)
