"""gather_kv: a table by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, assert_same, assert_writes_as_reference, misaligned, seeded, threads
from tests.ops.refusals import refusing
from trimserve.ops import PAGE_POSITIONS, gather_kv, reference

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, int, Tensor, Tensor, Tensor, Tensor]


def draw(
    num_features: int,
    num_kept: int,
    num_kv_heads: int = 2,
    head_dim: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Pages full of NaN with room for more than is kept, random rows and choices of them, distinct random slots."""
    generator = seeded(seed)
    num_pages = num_kept // PAGE_POSITIONS + 2
    pages = torch.full((num_pages, 3, 2, num_kv_heads, PAGE_POSITIONS, head_dim), nan, dtype=dtype)
    keys, values = torch.randn(2, num_features, num_kv_heads, head_dim, generator=generator).to(dtype)
    kept = torch.randint(0, max(num_features, 1), (num_kept,), generator=generator)
    slots = torch.randperm(num_pages * PAGE_POSITIONS, generator=generator)[:num_kept]
    return pages, 1, keys, values, kept, slots


@pytest.mark.parametrize("op", [gather_kv, reference.gather_kv])
def test_kept_rows_go_to_their_page_and_offset(op: Callable[..., None]) -> None:
    pages = torch.zeros(2, 2, 2, 1, PAGE_POSITIONS, 2)
    rows = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
    op(pages, 1, rows, 10 * rows, torch.tensor([2, 0]), torch.tensor([PAGE_POSITIONS + 3, 0]))
    written = {tuple(place): pages[tuple(place)].tolist() for place in pages.any(dim=-1).nonzero().tolist()}
    assert written == {  # page, layer, half, head, offset
        (1, 1, 0, 0, 3): [5.0, 6.0],
        (1, 1, 1, 0, 3): [50.0, 60.0],
        (0, 1, 0, 0, 0): [1.0, 2.0],
        (0, 1, 1, 0, 0): [10.0, 20.0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_features", "num_kept"), [(1, 1), (65, 20), (65, 65), (65, 0), (0, 0), (5, 900)])
def test_equals_reference(num_features: int, num_kept: int, dtype: torch.dtype) -> None:
    assert_writes_as_reference(gather_kv, draw(num_features, num_kept, dtype=dtype))


@given(
    num_features=st.integers(1, 50),
    num_kept=st.integers(0, 60),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    num_features: int, num_kept: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    assert_writes_as_reference(gather_kv, draw(num_features, num_kept, num_kv_heads, head_dim, dtype, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    pages, layer, keys, values, *indices = draw(30, 12)
    kept, slots = (index.repeat_interleave(2)[::2] for index in indices)
    assert_writes_as_reference(gather_kv, (pages, layer, layout(keys), layout(values), kept, slots))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_only_its_inputs_and_writes_only_its_slots(dtype: torch.dtype) -> None:
    pages, layer, keys, values, kept, slots = draw(30, 12, dtype=dtype)
    expected = pages.clone()
    reference.gather_kv(expected, layer, keys, values, kept, slots)
    for offset in range(18):
        view, buffer = misaligned(pages, offset, 7.0)
        rows = (misaligned(part, offset, nan)[0] for part in (keys, values))
        gather_kv(view, layer, *rows, *(misaligned(index, offset, -7)[0] for index in (kept, slots)))
        assert_same(buffer, misaligned(expected, offset, 7.0)[1])


@pytest.mark.parametrize(
    ("offset", "head_dim"),
    [(0, 96), (1, 96), (4, 96), (0, 97)],
    ids=["aligned", "misaligned", "aligned to 16 bytes", "heads of no multiple of 16 bytes"],
)
def test_threads_write_disjoint_rows_that_no_cache_holds(offset: int, head_dim: int) -> None:
    pages, layer, keys, values, kept, slots = draw(1000, 900, num_kv_heads=8, head_dim=head_dim)
    with threads(3):
        assert_writes_as_reference(gather_kv, (misaligned(pages, offset, 7.0)[0], layer, keys, values, kept, slots))


@pytest.mark.usefixtures("checked_values")
def test_refused_indices_leave_the_pages_alone() -> None:
    pages, layer, keys, values, kept, slots = draw(30, 12)
    kept[-1] = 30
    with pytest.raises(ValueError, match="kept"):
        gather_kv(pages, layer, keys, values, kept, slots)
    assert pages.isnan().all()


P, KV = torch.zeros(3, 4, 2, 2, PAGE_POSITIONS, 8), torch.zeros(5, 2, 8)
M = torch.arange(3)
PAGES = (
    "pages must be float32, bfloat16 or float16 [P, G, 2, Hkv, 16, Dh], "
    "or int8 [P, G, 2, Hkv, 16, Dh + 2] on a CPU, got float32 [4, 2, 2, 16, 8]"
)
REFUSALS: list[tuple[Inputs, str]] = [
    (
        (P[0], 0, KV, KV, M, M),
        PAGES,
    ),
    ((P[:, :2], 0, KV, KV, M, M), "pages must be contiguous"),
    ((P, 4, KV, KV, M, M), "layer must be in [0, 4), got 4"),
    ((P, 0, KV[0], KV, M, M), "keys must be [N, Hkv, Dh], got float32 [2, 8]"),
    ((P, 0, KV.half(), KV, M, M), "keys must be float32 [5, 2, 8] like pages, got float16 [5, 2, 8]"),
    ((P, 0, KV[:, :1], KV, M, M), "keys must be float32 [5, 2, 8] like pages, got float32 [5, 1, 8]"),
    ((P, 0, KV, KV[:4], M, M), "values must be float32 [5, 2, 8] like keys and pages, got float32 [4, 2, 8]"),
    ((P, 0, KV, KV[..., :7], M, M), "values must be float32 [5, 2, 8] like keys and pages, got float32 [5, 2, 7]"),
    ((P, 0, KV, KV, M.int(), M), "kept must be int64 [M], got int32 [3]"),
    ((P, 0, KV, KV, M[None], M), "kept must be int64 [M], got int64 [1, 3]"),
    ((P, 0, KV, KV, M, M.int()), "slots must be int64 [M], got int32 [3]"),
    ((P, 0, KV, KV, M, M[:2]), "slots must have M=3 entries like kept, got 2"),
]
REFUSED_VALUES: list[tuple[Inputs, str]] = [
    ((P, 0, KV, KV, M + 3, M), "kept must be in [0, 5), got 5"),
    ((P, 0, KV, KV, M - 1, M), "kept must be in [0, 5), got -1"),
    ((P, 0, KV, KV, M, M + 46), "slots must be in [0, 48), got 48"),
]


test_refuses_with_its_reason = refusing(gather_kv, REFUSALS)
test_refuses_values_with_its_reason = refusing(gather_kv, REFUSED_VALUES, "checked_values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.gather_kv.default, draw(30, 12, dtype=dtype))
