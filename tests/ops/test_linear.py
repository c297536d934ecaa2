"""linear: a table by hand, equality with the reference, independence of the batch, edges, refusals."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned
from tests.ops.refusals import assert_refused
from tests.tolerances import LINEAR
from trimserve.ops import layers, linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = [linear, layers._linear_of_torch]  # the latter is what CUDA runs
Inputs = tuple[Tensor, Tensor, Tensor | None]


def draw(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype = torch.float32,
    is_int8: bool = False,
    seed: int = 0,
) -> Inputs:
    """Random rows and weight; the latter int8 with scales, or of the rows' dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    if not is_int8:
        return x, torch.randn(num_outputs, num_inputs, generator=generator).to(dtype), None
    weight = torch.randint(-128, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    return x, weight, torch.rand(num_outputs, generator=generator) / 127


def assert_equals_reference(inputs: Inputs, op: Callable[..., Tensor] = linear) -> None:
    torch.testing.assert_close(op(*inputs), reference.linear(*inputs), **LINEAR[inputs[0].dtype])


@pytest.mark.parametrize("op", [*OPS, reference.linear])
def test_rows_are_multiplied_with_every_row_of_the_weight(op: Callable[..., Tensor]) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1, 0, 0], [0, 1, 2]])
    assert op(x, weight.float()).tolist() == [[1, 8], [0, 0]]
    assert op(x, weight.to(torch.int8), torch.tensor([10.0, 0.5])).tolist() == [[10, 4], [0, 0]]


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 288, 192), (16, 1024, 192), (70, 33, 200), (9, 640, 3000)])
@pytest.mark.parametrize("op", OPS)
def test_equals_reference(
    op: Callable[..., Tensor], rows: int, outputs: int, inputs: int, dtype: torch.dtype, is_int8: bool
) -> None:
    assert_equals_reference(draw(rows, outputs, inputs, dtype, is_int8), op)


@pytest.mark.parametrize("op", OPS)
@given(
    num_rows=st.integers(0, 70),
    num_outputs=st.integers(0, 40),
    num_inputs=st.integers(0, 100),
    dtype=st.sampled_from(DTYPES),
    is_int8=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    op: Callable[..., Tensor],
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    is_int8: bool,
    seed: int,
) -> None:
    assert_equals_reference(draw(num_rows, num_outputs, num_inputs, dtype, is_int8, seed), op)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_last_bit_in_every_batch_and_on_every_thread(
    dtype: torch.dtype, is_int8: bool
) -> None:
    x, weight, scales = draw(23, 1100, 1500, dtype, is_int8)  # of bfloat16, 8 rows are not cut along K, 16 are
    together = linear(x, weight, scales)
    assert_equals_reference((x, weight, scales))
    for end in (1, 2, 3, 4, 5, 8, 13, 16, 17):
        assert torch.equal(linear(x[:end], weight, scales), together[:end])
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear(x, weight, scales), together)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_rows_does_not_matter(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, is_int8: bool) -> None:
    x, weight, scales = draw(6, 20, 40, dtype, is_int8)
    assert torch.equal(linear(layout(x), weight, scales), linear(x, weight, scales))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_beside_its_arguments(dtype: torch.dtype, is_int8: bool) -> None:
    x, weight, scales = draw(5, 20, 37, dtype, is_int8)
    expected = linear(x, weight, scales)
    for offset in range(18):
        rows = misaligned(x, offset, nan)[0]
        columns = misaligned(weight, offset, 127 if is_int8 else nan)[0]
        assert torch.equal(linear(rows, columns, scales), expected)


def test_what_is_not_finite_stays_in_its_row_and_output() -> None:
    x, weight, _ = draw(6, 20, 40)
    x[1, 3], weight[7, 0] = nan, inf
    is_finite = torch.ones(6, 20, dtype=torch.bool)
    is_finite[1], is_finite[:, 7] = False, False
    assert torch.equal(linear(x, weight).isfinite(), is_finite)


X, W, Q, S = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int8), torch.zeros(3)
REFUSALS: list[tuple[Inputs, str]] = [
    ((X.double(), W, None), "x must be float32, bfloat16 or float16 [R, K], got float64 [5, 8]"),
    ((X[0], W, None), "x must be float32, bfloat16 or float16 [R, K], got float32 [8]"),
    ((X, W.half(), None), "weight must be float32 [N, K] like x, got float16 [3, 8]"),
    ((X, W[:, :7], None), "weight must be float32 [N, K] like x, got float32 [3, 7]"),
    ((X, W[0], None), "weight must be float32 [N, K] like x, got float32 [8]"),
    ((X[:, :7], torch.zeros(3, 8)[:, :7], None), "weight must be contiguous"),
    ((X, Q, None), "weight must be float32 [N, K] like x, got int8 [3, 8]"),
    ((X, W, S), "weight must be int8 [N, K] like x, got float32 [3, 8]"),
    ((X, Q, S.half()), "scales must be float32 [N] like weight, got float16 [3]"),
    ((X, Q, S[:2]), "scales must be float32 [N] like weight, got float32 [2]"),
    ((X, Q, S[None]), "scales must be float32 [N] like weight, got float32 [1, 3]"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refuses_with_its_reason(arguments: Inputs, message: str) -> None:
    assert_refused(linear, arguments, message)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, is_int8: bool) -> None:
    torch.library.opcheck(torch.ops.trimserve.linear.default, draw(5, 20, 40, dtype, is_int8))
