"""rotate_write_kv: equality with rotate and write_kv one after the other, what it leaves alone, refusals."""

from math import nan, pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import assert_same, misaligned, seeded, with_strided_rows
from tests.ops.refusals import refusing
from trimserve.ops import PAGE_POSITIONS, reference, rotate, rotate_write_kv, write_kv

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]


def draw(
    num_rows: int, num_heads: int = 3, num_kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Random heads and angles; layer 1 of 3 of pages full of NaN, distinct random slots."""
    generator = seeded(0)
    heads = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.randn(num_rows, head_dim // 2, generator=generator) * 9
    pages = torch.full((num_rows // 8 + 2, 3, 2, num_kv_heads, PAGE_POSITIONS, head_dim), nan, dtype=dtype)
    slots = torch.randperm(len(pages) * PAGE_POSITIONS, generator=generator)[:num_rows]
    return heads, angles.cos(), angles.sin(), pages, 1, slots


def one_after_the_other(
    heads: Tensor, cosines: Tensor, sines: Tensor, pages: Tensor, layer: int, slots: Tensor
) -> None:
    """What the op is, of two."""
    num_kv_heads = pages.shape[3]
    first_value = heads.shape[1] - num_kv_heads
    rotate(heads[:, :first_value], cosines, sines)
    write_kv(pages, layer, heads[:, first_value - num_kv_heads : first_value], heads[:, first_value:], slots)


def test_a_hand_worked_row() -> None:
    for op in (rotate_write_kv, reference.rotate_write_kv):
        heads, pages = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]), torch.zeros(2, 1, 2, 1, PAGE_POSITIONS, 2)
        angle = torch.tensor([[pi / 2]])
        op(heads, angle.cos(), angle.sin(), pages, 0, torch.tensor([PAGE_POSITIONS + 3]))
        expected = torch.tensor([[-2.0, 1.0], [-4.0, 3.0], [5.0, 6.0]])  # a quarter turn, but not of the value
        torch.testing.assert_close(heads[0], expected)
        torch.testing.assert_close(pages[1, 0, :, 0, 3], expected[1:])
        assert pages.count_nonzero() == 4


@given(
    num_rows=st.integers(0, 40),
    num_heads=st.integers(0, 5),
    num_kv_heads=st.integers(0, 3),
    half=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_rotating_and_then_writing(
    num_rows: int, num_heads: int, num_kv_heads: int, half: int, dtype: torch.dtype
) -> None:
    inputs = draw(num_rows, num_heads, num_kv_heads, 2 * half, dtype)
    heads, pages = inputs[0].clone(), inputs[3].clone()
    one_after_the_other(heads, *inputs[1:3], pages, *inputs[4:])
    rotate_write_kv(*inputs)
    assert_same(inputs[0], heads)
    assert_same(inputs[3], pages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(dtype: torch.dtype) -> None:
    inputs = draw(20, dtype=dtype)
    heads, pages = inputs[0].clone(), inputs[3].clone()
    reference.rotate_write_kv(heads, *inputs[1:3], pages, *inputs[4:])
    rotate_write_kv(*inputs)
    torch.testing.assert_close(inputs[0], heads)
    torch.testing.assert_close(inputs[3], pages, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes_only_its_own_at_any_alignment(dtype: torch.dtype) -> None:
    heads, cosines, sines, pages, layer, slots = draw(20, dtype=dtype)
    turned, stored = heads.clone(), pages.clone()
    one_after_the_other(turned, cosines, sines, stored, layer, slots)
    for offset in range(10):
        of_heads, heads_buffer = misaligned(heads, offset, 7.0)
        of_pages, pages_buffer = misaligned(pages, offset, 7.0)
        cos, sin = (misaligned(each, offset, nan)[0] for each in (cosines, sines))
        rotate_write_kv(of_heads, cos, sin, of_pages, layer, misaligned(slots, offset, -7)[0])
        assert_same(heads_buffer, misaligned(turned, offset, 7.0)[1])
        assert_same(pages_buffer, misaligned(stored, offset, 7.0)[1])


def test_layout_of_rows_does_not_matter() -> None:
    heads, cosines, sines, pages, layer, slots = draw(20)
    expected = heads.clone(), pages.clone()
    rotate_write_kv(expected[0], cosines, sines, expected[1], layer, slots)
    strided = with_strided_rows(heads)
    rotate_write_kv(strided, cosines, sines, pages, layer, slots.repeat_interleave(2)[::2])
    assert_same(strided, expected[0])
    assert_same(pages, expected[1])


def test_a_slot_out_of_range_is_refused_or_not_written(device: str) -> None:
    heads, cosines, sines, pages, layer, slots = draw(3)
    slots[1] = len(pages) * PAGE_POSITIONS
    if device == "cpu":
        with pytest.raises(ValueError, match="rotate_write_kv: slots must be in"):
            rotate_write_kv(heads, cosines, sines, pages, layer, slots)
        assert pages.isnan().all()
    else:
        rotate_write_kv(heads, cosines, sines, pages, layer, slots)
        assert pages[:, 1, 0, 0, :, 0].isfinite().sum() == 2


H, A, S = torch.zeros(3, 5, 4), torch.zeros(3, 2), torch.arange(3)
P = torch.zeros(2, 1, 2, 2, PAGE_POSITIONS, 4)
REFUSALS: list[tuple[tuple[Any, ...], str]] = [
    (
        (H.double(), A, A, P, 0, S),
        "heads must be float32, bfloat16 or float16 [R, H, Dh] with Dh even, got float64 [3, 5, 4]",
    ),
    ((H.half(), A, A, P, 0, S), "heads must be float32 [R, H + 2 Hkv, 4] like pages, got float16 [3, 5, 4]"),
    ((H[..., :2], A[:, :1], A[:, :1], P, 0, S), "heads must be contiguous within a row"),
    ((H[:, :3], A, A, P, 0, S), "heads must have at least 2 Hkv=4 heads, keys and values of pages, got 3"),
    ((H, A[:, :1], A, P, 0, S), "cosines must be float32 [3, 2] like heads, got float32 [3, 1]"),
    ((H, A, A, P, 1, S), "layer must be in [0, 1), got 1"),
    ((H, A, A, P, 0, S.int()), "slots must be int64 [R], got int32 [3]"),
    ((H, A, A, P, 0, S[:2]), "slots must have R=3 entries like heads, got 2"),
]


test_refuses_with_its_reason = refusing(rotate_write_kv, REFUSALS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.rotate_write_kv.default, draw(20, dtype=dtype))
