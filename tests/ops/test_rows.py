"""rms_norm, silu_gate and rotate: tables by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable
from math import inf, nan, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, seeded
from tests.tolerances import SILU_GATE
from trimserve.ops import layers, reference, rms_norm, rotate, silu_gate

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [rms_norm, layers._rms_norm_of_torch]  # the latter is what CUDA runs
SIZES = st.integers(1, 50)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("op", [*NORMS, reference.rms_norm])
def test_a_hand_worked_norm(op: Callable[..., Tensor]) -> None:
    normed = op(torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.0001)
    # mean square 6.25, root 2.5
    torch.testing.assert_close(normed, torch.tensor([[1.2, 3.2, 0.0, 0.0], [0.0] * 4]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("op", NORMS)
@given(st.integers(0, 5), SIZES, st.sampled_from([None, 0, 1, 3]), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_norm_equals_reference(
    op: Callable[..., Tensor], rows: int, size: int, heads: int | None, dtype: torch.dtype, seed: int
) -> None:
    shape = (rows, size) if heads is None else (rows, heads, size)
    x, weight = draw(*shape, dtype=dtype, seed=seed), draw(size, dtype=dtype, seed=seed + 1)
    torch.testing.assert_close(op(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("op", [silu_gate, reference.silu_gate])
def test_a_hand_worked_gate(op: Callable[..., Tensor]) -> None:
    passed = op(torch.tensor([[0.0, 1.0, -1.0, 100.0, -100.0, 5.0, 2.0, 2.0, 3.0, 7.0]]))
    expected = torch.tensor([[0.0, 1.46211716, -0.53788284, 300.0, 0.0]])
    torch.testing.assert_close(passed, expected, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 5), SIZES, st.sampled_from(DTYPES), st.floats(0.1, 30), st.integers(0, 2**16))
def test_gate_equals_reference(rows: int, size: int, dtype: torch.dtype, spread: float, seed: int) -> None:
    gate_up = (draw(rows, 2 * size, seed=seed) * spread).to(dtype)
    torch.testing.assert_close(silu_gate(gate_up), reference.silu_gate(gate_up), **SILU_GATE[dtype])


@given(st.integers(0, 5), SIZES, st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_rows_that_count_nothing_become_zero(rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    gate_up, counts = draw(rows, 2 * size, dtype=dtype, seed=seed), torch.arange(rows, dtype=torch.int32) % 3
    passed = silu_gate(gate_up, counts)
    assert torch.equal(passed[counts > 0], silu_gate(gate_up)[counts > 0])
    torch.testing.assert_close(passed, reference.silu_gate(gate_up, counts), **SILU_GATE[dtype])
    gate_up[counts == 0] = nan
    assert torch.equal(silu_gate(gate_up, counts.repeat_interleave(2)[::2]), passed)


def test_a_gate_that_is_not_a_number_stays_where_it_is() -> None:
    passed = silu_gate(torch.tensor([[nan, inf, 1.0, 1.0, 1.0, 1.0]]))
    assert passed[0, 0].isnan()
    assert passed[0, 1:].tolist() == pytest.approx([inf, 0.7310586])


@pytest.mark.parametrize("op", [rotate, reference.rotate])
def test_a_quarter_turn_exchanges_the_halves_of_a_head(op: Callable[..., Tensor]) -> None:
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]])
    angles = torch.tensor([[pi / 2, 0.0], [0.0, pi / 2]])
    op(heads, angles.cos(), angles.sin())
    expected = torch.tensor([[[-3.0, 2.0, 1.0, 4.0]], [[1.0, -4.0, 3.0, 2.0]]])
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-6)


@given(st.integers(0, 5), st.integers(0, 4), SIZES, st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_rotation_equals_reference(rows: int, num_heads: int, half: int, dtype: torch.dtype, seed: int) -> None:
    heads, angles = draw(rows, num_heads, 2 * half, dtype=dtype, seed=seed), draw(rows, half, seed=seed + 1) * 9
    expected = heads.clone()
    reference.rotate(expected, angles.cos(), angles.sin())
    rotate(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(heads, expected)


def test_rotation_of_a_part_leaves_the_rest() -> None:
    heads, angles = draw(4, 6, 8), draw(4, 4)
    before = heads.clone()
    rotate(heads[:, :5], angles.cos(), angles.sin())
    assert torch.equal(heads[:, 5], before[:, 5])
    assert not torch.equal(heads[:, 4], before[:, 4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_layout_are_read(layout: Callable[[Tensor], Tensor]) -> None:
    x, weight = draw(4, 3, 10), draw(10)
    torch.testing.assert_close(rms_norm(layout(x), weight, 1e-6), rms_norm(x, weight, 1e-6))
    assert torch.equal(silu_gate(layout(x[:, 0])), silu_gate(x[:, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_only_its_inputs_and_turns_only_its_heads(dtype: torch.dtype) -> None:
    x, weight, angles = draw(4, 3, 10, dtype=dtype), draw(10, dtype=dtype), draw(4, 5)
    normed, gated, turned = rms_norm(x, weight, 1e-6), silu_gate(x[:, 0]), x.clone()
    rotate(turned, angles.cos(), angles.sin())
    for offset in range(18):
        rows, factors = misaligned(x, offset, nan)[0], misaligned(weight, offset, nan)[0]
        assert torch.equal(rms_norm(rows, factors, 1e-6), normed)
        assert torch.equal(silu_gate(misaligned(x[:, 0], offset, nan)[0]), gated)
        heads, buffer = misaligned(x, offset, 7.0)
        rotate(heads, misaligned(angles.cos(), offset, nan)[0], misaligned(angles.sin(), offset, nan)[0])
        assert torch.equal(buffer, misaligned(turned, offset, 7.0)[1])


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_spoils_its_own_row_or_head(value: float) -> None:
    x, angles = draw(3, 2, 8), draw(3, 4)
    x[1, 1, 5] = value
    is_finite = torch.ones(3, 2, dtype=torch.bool)
    is_finite[1, 1] = False
    assert torch.equal(rms_norm(x, torch.ones(8), 1e-6).isfinite().all(dim=-1), is_finite)
    rotate(x, angles.cos(), angles.sin())
    assert torch.equal(x.isfinite().all(dim=-1), is_finite)


ROWS, TURNS = torch.ones(2, 3, 4), torch.ones(2, 2)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(ROWS[0, 0], torch.ones(4), 0.1), r"rms_norm: x must be .* got float32 \[4\]"),
        (lambda: rms_norm(ROWS.double(), torch.ones(4), 0.1), r"rms_norm: x must be .* got float64 \[2, 3, 4\]"),
        (lambda: rms_norm(ROWS, torch.ones(4).half(), 0.1), r"rms_norm: weight must be float32 .* got float16 \[4\]"),
        (lambda: rms_norm(ROWS, torch.ones(3), 0.1), r"rms_norm: weight must be float32 \[K\] like x, got .* \[3\]"),
        (lambda: rms_norm(ROWS, torch.ones(4), -0.1), r"rms_norm: epsilon must be finite and at least 0, got -0.1"),
        (lambda: rms_norm(ROWS, torch.ones(4), nan), r"rms_norm: epsilon must be finite and at least 0, got nan"),
        (lambda: silu_gate(torch.ones(2, 3)), r"silu_gate: gate_up must be .* \[R, 2 I\], got float32 \[2, 3\]"),
        (lambda: silu_gate(torch.ones(2, 4).long()), r"silu_gate: gate_up must be .* got int64 \[2, 4\]"),
        (lambda: silu_gate(ROWS), r"silu_gate: gate_up must be .* got float32 \[2, 3, 4\]"),
        (lambda: silu_gate(TURNS, torch.ones(2)), r"silu_gate: counts must be int32 \[2\] like gate_up, got float32"),
        (
            lambda: silu_gate(TURNS, torch.ones(3).int()),
            r"silu_gate: counts must be int32 \[2\] like gate_up, got .* \[3\]",
        ),
        (lambda: rotate(ROWS.double(), TURNS, TURNS), r"rotate: heads must be .* got float64 \[2, 3, 4\]"),
        (lambda: rotate(ROWS[0], TURNS, TURNS), r"rotate: heads must be .* got float32 \[3, 4\]"),
        (lambda: rotate(torch.ones(2, 3, 5), TURNS, TURNS), r"rotate: heads must be .* Dh even, got .* \[2, 3, 5\]"),
        (lambda: rotate(ROWS.mT, torch.ones(2, 1), torch.ones(2, 1)), "rotate: heads must be .* Dh even"),
        (lambda: rotate(torch.ones(2, 4, 4).mT, TURNS, TURNS), "rotate: heads must be contiguous within a row"),
        (lambda: rotate(ROWS, torch.ones(2, 3), TURNS), r"rotate: cosines must be float32 \[2, 2\] like heads, got"),
        (lambda: rotate(ROWS, TURNS, TURNS.double()), r"rotate: sines must be float32 .* got float64 \[2, 2\]"),
    ],
)
def test_refusals_name_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
