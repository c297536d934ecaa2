"""write_kv: a table by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, assert_same, assert_writes_as_reference, misaligned, seeded, threads
from tests.ops.refusals import refusing
from trimserve.ops import PAGE_POSITIONS, reference, write_kv

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, int, Tensor, Tensor, Tensor]


def draw(
    num_pages: int,
    num_rows: int,
    num_layers: int = 3,
    layer: int = 1,
    num_kv_heads: int = 2,
    head_dim: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Pages full of NaN, random rows, distinct random slots."""
    generator = seeded(seed)
    pages = torch.full((num_pages, num_layers, 2, num_kv_heads, PAGE_POSITIONS, head_dim), nan, dtype=dtype)
    keys, values = torch.randn(2, num_rows, num_kv_heads, head_dim, generator=generator).to(dtype)
    slots = torch.randperm(num_pages * PAGE_POSITIONS, generator=generator)[:num_rows]
    return pages, layer, keys, values, slots


@pytest.mark.parametrize("op", [write_kv, reference.write_kv])
def test_rows_go_to_their_page_and_offset(op: Callable[[Tensor, int, Tensor, Tensor, Tensor], None]) -> None:
    pages = torch.zeros(3, 2, 2, 2, PAGE_POSITIONS, 1)
    keys = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).unsqueeze(-1)
    op(pages, 1, keys, 10 * keys, torch.tensor([2 * PAGE_POSITIONS + 5, 0]))
    written = {tuple(place): pages[tuple(place)].item() for place in pages.nonzero().tolist()}
    assert written == {  # page, layer, half, head, offset
        (2, 1, 0, 0, 5, 0): 1.0,
        (2, 1, 0, 1, 5, 0): 2.0,
        (2, 1, 1, 0, 5, 0): 10.0,
        (2, 1, 1, 1, 5, 0): 20.0,
        (0, 1, 0, 0, 0, 0): 3.0,
        (0, 1, 0, 1, 0, 0): 4.0,
        (0, 1, 1, 0, 0, 0): 30.0,
        (0, 1, 1, 1, 0, 0): 40.0,
    }


@given(
    num_pages=st.integers(0, 5),
    num_rows=st.integers(0, 90),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(0, 4),
    head_dim=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    num_pages: int,
    num_rows: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_rows = min(num_rows, num_pages * PAGE_POSITIONS)
    assert_writes_as_reference(
        write_kv, draw(num_pages, num_rows, num_layers, seed % num_layers, num_kv_heads, head_dim, dtype)
    )


def with_strided_heads(rows: Tensor) -> Tensor:
    """Give the same values as a slice of a projection whose heads hold more than keys or values."""
    return torch.cat([rows, rows], dim=2)[:, :, : rows.shape[2]]


@pytest.mark.parametrize("layout", [*LAYOUTS, with_strided_heads])
def test_layout_of_rows_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    pages, layer, keys, values, slots = draw(3, 20)
    assert_writes_as_reference(write_kv, (pages, layer, layout(keys), layout(values), slots.repeat_interleave(2)[::2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_only_its_slots(dtype: torch.dtype) -> None:
    pages, layer, keys, values, slots = draw(3, 20, dtype=dtype)
    expected = pages.clone()
    reference.write_kv(expected, layer, keys, values, slots)
    for offset in range(18):
        view, buffer = misaligned(pages, offset, 7.0)
        expected_buffer = misaligned(expected, offset, 7.0)[1]
        keys_view, values_view = (misaligned(rows, offset, nan)[0] for rows in (keys, values))
        write_kv(view, layer, keys_view, values_view, misaligned(slots, offset, -7)[0])
        assert_same(buffer, expected_buffer)


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim"),
    [(2, 96), (8, 96), (8, 97)],
    ids=["that a cache holds", "that no cache holds", "that no cache holds, of no multiple of 16 bytes"],
)
def test_threads_write_disjoint_rows(num_kv_heads: int, head_dim: int) -> None:
    with threads(3):
        assert_writes_as_reference(write_kv, draw(70, 1100, 1, 0, num_kv_heads, head_dim))


@pytest.mark.usefixtures("checked_values")
def test_refused_slots_leave_the_pages_alone() -> None:
    pages, layer, keys, values, slots = draw(3, 20)
    slots[-1] = 48
    with pytest.raises(ValueError, match="slots"):
        write_kv(pages, layer, keys, values, slots)
    assert pages.isnan().all()


P, KV, S = torch.zeros(3, 4, 2, 2, PAGE_POSITIONS, 8), torch.zeros(5, 2, 8), torch.arange(5)
PAGES = (
    "pages must be float32, bfloat16 or float16 [P, G, 2, Hkv, 16, Dh], "
    "or int8 [P, G, 2, Hkv, 16, Dh + 2] on a CPU, got"
)
LIKE = "must be float32 [5, 2, 8] like slots and pages, got"
REFUSALS: list[tuple[Inputs, str]] = [
    ((P.double(), 0, KV, KV, S), f"{PAGES} float64 [3, 4, 2, 2, 16, 8]"),
    ((P[0], 0, KV, KV, S), f"{PAGES} float32 [4, 2, 2, 16, 8]"),
    ((P[:, :, :1], 0, KV, KV, S), f"{PAGES} float32 [3, 4, 1, 2, 16, 8]"),
    ((P[..., :8, :], 0, KV, KV, S), f"{PAGES} float32 [3, 4, 2, 2, 8, 8]"),
    ((P[:, :2], 0, KV, KV, S), "pages must be contiguous"),
    ((P, -1, KV, KV, S), "layer must be in [0, 4), got -1"),
    ((P, 4, KV, KV, S), "layer must be in [0, 4), got 4"),
    ((P, 0, KV.half(), KV, S), f"keys {LIKE} float16 [5, 2, 8]"),
    ((P, 0, KV[:4], KV, S), f"keys {LIKE} float32 [4, 2, 8]"),
    ((P, 0, KV[:, :1], KV, S), f"keys {LIKE} float32 [5, 1, 8]"),
    ((P, 0, KV, KV[..., :7], S), f"values {LIKE} float32 [5, 2, 7]"),
    ((P, 0, KV, KV[0], S), f"values {LIKE} float32 [2, 8]"),
    ((P, 0, KV, KV, S.int()), "slots must be int64 [R], got int32 [5]"),
    ((P, 0, KV, KV, S[None]), "slots must be int64 [R], got int64 [1, 5]"),
]
REFUSED_VALUES: list[tuple[Inputs, str]] = [
    ((P, 0, KV, KV, S + 44), "slots must be in [0, 48), got 48"),
    ((P, 0, KV, KV, S - 1), "slots must be in [0, 48), got -1"),
]


test_refuses_with_its_reason = refusing(write_kv, REFUSALS)
test_refuses_values_with_its_reason = refusing(write_kv, REFUSED_VALUES, "checked_values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.write_kv.default, draw(3, 20, dtype=dtype))
