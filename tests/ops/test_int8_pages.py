"""Pages of int8: how rows lie in them by hand, writing and reading equal to the reference, what is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.ops.arrays import seeded, with_strided_rows
from tests.ops.refusals import assert_refused
from tests.ops.test_paged_attention import ANY_BATCH, EDGES, place
from tests.tolerances import INT8_PAGES
from trimserve.model.kv_format import round_as_stored, row_bytes
from trimserve.ops import PAGE_POSITIONS, gather_kv, paged_attention, reference, write_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, int, Tensor, Tensor, float, Tensor | None]


def empty_pages(num_pages: int, num_kv_heads: int, head_dim: int, layers: int = 1) -> Tensor:
    """Pages full of NaN scales."""
    return torch.full((num_pages, layers, 2, num_kv_heads, PAGE_POSITIONS, head_dim + 2), 127, dtype=torch.int8)


TABLE = [  # a row, its integers, its scale
    ([127.0, -64.0, 0.4, 0.5, 1.5], [127, -64, 0, 0, 2], 1.0),  # ties to even
    ([-254.0, 127.0], [-127, 64], 2.0),
    ([0.0, -0.0], [0, 0], 0.0),
    ([math.nan, 5.0], [0, 0], math.nan),
    ([5.0, -math.inf], [0, 0], math.nan),
    ([1e9, 1.0], [0, 0], math.nan),  # no float16 is as large as its scale
    ([1e-7, 0.0], [0, 0], 0.0),  # nor as small
    ([127 * 2.0**-24, 2.0**-24], [127, 1], 2.0**-24),
]


@pytest.mark.parametrize("op", [write_kv, reference.write_kv])
@pytest.mark.parametrize(("row", "integers", "scale"), TABLE)
def test_hand_worked_rows(op: object, row: list[float], integers: list[int], scale: float) -> None:
    assert callable(op)
    pages = empty_pages(1, 1, len(row))
    rows = torch.tensor(row).view(1, 1, -1)
    op(pages, 0, rows, rows.flip(2), torch.tensor([3]))
    stored, scales = (part[0, 0, :, 0, 3] for part in reference.int8_parts(pages))
    assert stored.tolist() == [integers, integers[::-1]]
    torch.testing.assert_close(scales, torch.full((2,), scale, dtype=torch.float16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_kv_heads", "head_dim"), [(0, 2, 8), (40, 3, 13), (70, 2, 64), (33, 1, 128)])
def test_writing_equals_the_reference(num_rows: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    generator = seeded(0)
    keys, values = torch.randn(2, num_rows + 5, num_kv_heads, head_dim, generator=generator).exp().to(dtype)
    slots = torch.randperm(6 * PAGE_POSITIONS, generator=generator)[:num_rows]
    kept = torch.randperm(num_rows + 5, generator=generator)[:num_rows]
    pages, expected = empty_pages(6, num_kv_heads, head_dim, 2), empty_pages(6, num_kv_heads, head_dim, 2)
    gather_kv(pages, 1, with_strided_rows(keys), values, kept, slots)
    reference.gather_kv(expected, 1, keys, values, kept, slots)
    assert torch.equal(pages, expected)
    write_kv(pages, 0, keys[:num_rows], values[:num_rows], slots)
    reference.write_kv(expected, 0, keys[:num_rows], values[:num_rows], slots)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_attends_to_what_is_read_from_its_pages(dtype: torch.dtype) -> None:
    rows = torch.randn(600, 2, 16, generator=seeded(0)).to(dtype)
    rows[1, 0, 3], rows[2, 1] = math.nan, 0
    pages, slots = empty_pages(38, 2, 16), torch.arange(600)
    write_kv(pages, 0, rows, rows, slots)
    read = reference.widened_pages(pages)[:, 0, 0].transpose(1, 2).flatten(0, 1)[:600]
    expected = read.to(dtype)
    round_as_stored(rows, empty_pages(1, 2, 16))
    torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)


def to_int8(floats: Tensor) -> Tensor:
    """Pages of floats as int8, with NaN scales where no position is."""
    pages = torch.empty(*floats.shape[:-1], floats.shape[-1] + 2, dtype=torch.int8)
    for stored, part in zip(reference.int8_parts(pages), reference.int8_rows(floats), strict=True):
        stored.copy_(part)
    return pages


def draw(
    lengths: Sequence[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """As in `test_paged_attention`, with a bias, in int8 pages."""
    generator = seeded(seed)
    q = torch.randn(len(lengths), num_heads, head_dim, generator=generator) * 4
    keys, values = torch.randn(2, sum(lengths), num_kv_heads, head_dim, generator=generator)
    floats, tables = place(keys, values, lengths, generator)
    pages = to_int8(floats)
    bias = torch.randn(len(lengths), tables.shape[1] * PAGE_POSITIONS, generator=generator)
    return q.to(dtype), pages, 1, tables, torch.tensor(lengths, dtype=torch.int32), head_dim**-0.5, bias


def assert_equals_reference(inputs: Inputs) -> None:
    attended, expected = paged_attention(*inputs), reference.paged_attention(*inputs)
    torch.testing.assert_close(attended, expected, equal_nan=True, **INT8_PAGES[attended.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 1), (6, 2, 24), (8, 1, 64), (4, 2, 128), (3, 1, 80), (5, 1, 13)]
)
def test_reading_equals_the_reference(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = draw(EDGES, num_heads, num_kv_heads, head_dim, dtype)
    assert_equals_reference(inputs)
    assert_equals_reference((*inputs[:6], None))


@given(**ANY_BATCH)
def test_reading_equals_the_reference_on_any_shape(
    lengths: list[int], num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    assert_equals_reference(draw(lengths, group * num_kv_heads, num_kv_heads, head_dim, dtype, seed))


def test_a_spoiled_row_spoils_only_its_sequence_and_head() -> None:
    q, pages, layer, tables, lengths, scale, _ = draw([20, 700], 4, 2, 16, torch.float32)
    expected = paged_attention(q, pages, layer, tables, lengths, scale)
    reference.int8_parts(pages)[1][tables[1, 3], layer, 0, 1, 5] = math.nan
    attended = paged_attention(q, pages, layer, tables, lengths, scale)
    assert attended[1, 2:].isnan().all()
    assert torch.equal(attended[1, :2], expected[1, :2])
    assert torch.equal(attended[0], expected[0])


def test_a_sequence_gets_the_same_bits_alone_and_in_any_company() -> None:
    q, pages, layer, tables, lengths, scale, _ = draw([*EDGES, 1600], 4, 2, 64, torch.bfloat16)
    together = paged_attention(q, pages, layer, tables, lengths, scale)
    for row in torch.arange(len(q)).split(1):
        alone = paged_attention(q[row], pages, layer, tables[row], lengths[row], scale)
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_position_takes_at_most_52_hundredths_of_bfloat16(head_dim: int) -> None:
    assert row_bytes("int8", head_dim) <= 0.52 * row_bytes("bfloat16", head_dim)


ROWS, PAGES = torch.zeros(3, 2, 8), empty_pages(2, 2, 8)


def test_rows_of_another_size_are_refused() -> None:
    message = "keys must be float32, bfloat16 or float16 [3, 2, 8] like slots and pages, got float32 [3, 2, 7]"
    assert_refused(write_kv, (PAGES, 0, ROWS[..., :7], ROWS, torch.arange(3)), message)
    message = "values must be float32 like keys, got float16"
    assert_refused(write_kv, (PAGES, 0, ROWS, ROWS.half(), torch.arange(3)), message)


def test_pages_without_room_for_a_scale_are_refused() -> None:
    message = "pages of int8 must have rows of at least 2, got 1"
    assert_refused(write_kv, (PAGES[..., :1].contiguous(), 0, ROWS, ROWS, torch.arange(3)), message)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.paged_attention.default, draw([20, 0, 40], 4, 2, 16, dtype))
