"""paged_attention: tables by hand, equality with the reference, edges, refusals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, seeded, threads
from tests.ops.refusals import assert_refused, refusing
from tests.tolerances import PAGED_ATTENTION
from trimserve.ops import PAGE_POSITIONS, paged_attention, reference, write_kv

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0, 1, 15, 16, 17, 100, 255, 256, 257, 511, 512, 513, 1030]  # around a page and pieces of the work
ANY_BATCH: dict[str, st.SearchStrategy[Any]] = {
    "lengths": st.lists(st.integers(0, 70) | st.sampled_from(EDGES), max_size=4),
    "num_kv_heads": st.integers(1, 3),
    "group": st.integers(1, 5),
    "head_dim": st.integers(1, 70),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**32),
}
Inputs = tuple[Tensor, Tensor, int, Tensor, Tensor, float]
BiasedInputs = tuple[Tensor, Tensor, int, Tensor, Tensor, float, Tensor]


def place(keys: Tensor, values: Tensor, lengths: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spread sequences, concatenated [sum of lengths, Hkv, Dh], over random pages of layer 1 of 3.

    Returns:
        Pages, NaN wherever no position is, and tables, garbage behind the last page of a sequence.
    """
    counts = [-(-length // PAGE_POSITIONS) for length in lengths]
    pages = keys.new_full((sum(counts) + 3, 3, 2, keys.shape[1], PAGE_POSITIONS, keys.shape[2]), math.nan)
    order = torch.randperm(len(pages), generator=generator, dtype=torch.int32)
    tables = torch.full((len(lengths), max(counts, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    tables[:, -1] = -1
    slots, used = [torch.empty(0, dtype=torch.int64)], 0
    for table, count, length in zip(tables, counts, lengths, strict=True):
        table[:count] = order[used : used + count]
        position = torch.arange(length)
        slots.append(table.long()[position // PAGE_POSITIONS] * PAGE_POSITIONS + position % PAGE_POSITIONS)
        used += count
    write_kv(pages, 1, keys, values, torch.cat(slots))
    return pages, tables


def draw(
    lengths: Sequence[int],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Random logits with a standard deviation of about 4."""
    generator = seeded(seed)
    q = torch.randn(len(lengths), num_heads, head_dim, generator=generator) * 4
    keys, values = torch.randn(2, sum(lengths), num_kv_heads, head_dim, generator=generator).to(dtype)
    pages, tables = place(keys, values, lengths, generator)
    return q.to(dtype), pages, 1, tables, torch.tensor(lengths, dtype=torch.int32), head_dim**-0.5


def with_bias(inputs: Inputs, seed: int = 0) -> BiasedInputs:
    """A random bias, NaN behind each sequence's last position."""
    tables, lengths = inputs[3], inputs[4]
    generator = seeded(seed)
    bias = torch.randn(len(tables), tables.shape[1] * PAGE_POSITIONS, generator=generator) * 4
    return *inputs, bias.masked_fill(torch.arange(bias.shape[1]) >= lengths[:, None], math.nan)


def assert_equals_reference(inputs: Inputs | BiasedInputs) -> None:
    attended, expected = paged_attention(*inputs), reference.paged_attention(*inputs)
    torch.testing.assert_close(attended, expected, equal_nan=True, **PAGED_ATTENTION[attended.dtype])


def one_head(query: float, keys: Sequence[float], values: Sequence[float], dtype: torch.dtype) -> Inputs:
    """One sequence, one head, Dh = 1, scale 1."""
    k, v = (torch.tensor(part, dtype=dtype).view(-1, 1, 1) for part in (keys, values))
    pages = torch.zeros(2, 1, 2, 1, PAGE_POSITIONS, 1, dtype=dtype)
    reference.write_kv(pages, 0, k, v, torch.arange(len(keys)))
    tables, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([len(keys)], dtype=torch.int32)
    return torch.full((1, 1, 1), query, dtype=dtype), pages, 0, tables, lengths, 1.0


LN3 = math.log(3)
TABLE = [  # query, keys, values, attended
    (1.0, [0.0, LN3], [4.0, 8.0], 7.0),
    (-1.0, [0.0, LN3], [4.0, 8.0], 5.0),
    (5.0, [2.0], [8.0], 8.0),
    (5.0, [], [], 0.0),
    (0.0, [9.0] * 17, [1.0] * 16 + [18.0], 2.0),  # into the second page
    (1.0, [-math.inf, 0.0], [4.0, 8.0], 8.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("query", "keys", "values", "expected"), TABLE)
def test_hand_worked_attention(
    query: float, keys: list[float], values: list[float], expected: float, dtype: torch.dtype
) -> None:
    op = paged_attention if dtype == torch.float32 else reference.paged_attention
    attended = op(*one_head(query, keys, values, dtype))
    torch.testing.assert_close(attended.item(), expected, **PAGED_ATTENTION[torch.float32])


BIAS_TABLE = [  # bias of each position, values, attended; all other logits are 1
    ([0.0, LN3], [4.0, 8.0], 7.0),
    ([-LN3, 0.0], [4.0, 8.0], 7.0),
    ([-math.inf, 0.0], [4.0, 8.0], 8.0),
    ([LN3, LN3], [4.0, 8.0], 6.0),
    ([0.0] * 16 + [4 * math.log(2)], [1.0] * 16 + [3.0], 2.0),  # the last weighs as much as the first page
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bias", "values", "expected"), BIAS_TABLE)
def test_hand_worked_bias(bias: list[float], values: list[float], expected: float, dtype: torch.dtype) -> None:
    op = paged_attention if dtype == torch.float32 else reference.paged_attention
    padded = torch.zeros(1, 2 * PAGE_POSITIONS)
    padded[0, : len(bias)] = torch.tensor(bias)
    attended = op(*one_head(1.0, [1.0] * len(values), values, dtype), padded)
    torch.testing.assert_close(attended.item(), expected, **PAGED_ATTENTION[torch.float32])


def test_query_heads_share_their_group_s_kv_head() -> None:
    pages = torch.zeros(1, 1, 2, 2, PAGE_POSITIONS, 1)
    pages[0, 0, 1, :, 0, 0] = torch.tensor([3.0, 5.0])
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    assert paged_attention(torch.ones(1, 4, 1), pages, 0, table, length, 1.0).flatten().tolist() == [3, 3, 5, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 1), (6, 6, 24), (6, 2, 24), (8, 1, 64), (4, 2, 128), (3, 1, 80), (5, 1, 13)],
)
def test_equals_reference(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = draw(EDGES, num_heads, num_kv_heads, head_dim, dtype)
    assert_equals_reference(inputs)
    assert_equals_reference(with_bias(inputs))


@given(**ANY_BATCH)
def test_equals_reference_on_any_shape(
    lengths: list[int], num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = draw(lengths, group * num_kv_heads, num_kv_heads, head_dim, dtype, seed)
    assert_equals_reference(inputs)
    assert_equals_reference(with_bias(inputs, seed))


def test_a_long_sequence_among_short_ones_equals_reference() -> None:
    assert_equals_reference(with_bias(draw([17_000, 0, 16_384, 3], num_heads=2, num_kv_heads=1, head_dim=4)))


@pytest.mark.parametrize("most", [256, 600], ids=["a piece each", "several pieces"])
def test_more_pieces_than_a_gpu_is_given_blocks_equal_reference(most: int) -> None:
    lengths = [0 if row % 7 == 3 else (row * 89) % most + 1 for row in range(40)]
    assert_equals_reference(draw(lengths, num_heads=32, num_kv_heads=32, head_dim=4))


def test_a_bias_of_zero_changes_no_bit() -> None:
    inputs = draw(EDGES)
    zero = torch.zeros(len(EDGES), inputs[3].shape[1] * PAGE_POSITIONS)
    assert torch.equal(paged_attention(*inputs, zero), paged_attention(*inputs))


def test_no_sequences_and_no_pages_give_empty_and_zero() -> None:
    q, pages, layer, tables, lengths, scale = draw([0, 0])
    assert not paged_attention(q, pages[:0], layer, tables[:, :0], lengths, scale).any()
    assert paged_attention(q[:0], pages, layer, tables[:0], lengths[:0], scale).shape == (0, 4, 16)


def test_large_logits_do_not_overflow() -> None:
    q, pages, layer, tables, lengths, _ = draw([40, 700])
    for scale in (1000.0, -1000.0):
        assert_equals_reference((q, pages, layer, tables, lengths, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once_to_the_nearest(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**15), 2**15, (2, 1, 4096), generator=seeded(0), dtype=torch.int16)
    values = bits.view(dtype).nan_to_num(0.0, 0.0, 0.0).unsqueeze(1)  # [2 positions, 1, 1, 4096], all magnitudes
    pages = torch.zeros(1, 1, 2, 1, PAGE_POSITIONS, 4096, dtype=dtype)
    pages[0, 0, 1, :, :2] = values[:, 0, 0]
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 2, dtype=torch.int32)
    attended = paged_attention(torch.zeros(1, 1, 4096, dtype=dtype), pages, 0, table, length, 1.0)
    assert torch.equal(attended[0, 0], values.double().mean(dim=0)[0, 0].float().to(dtype))


@pytest.mark.parametrize("length", EDGES[1:])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoiled_sequence_spoils_no_other(value: float, length: int) -> None:
    q, pages, layer, tables, lengths, scale = draw([20, length, 700])
    expected = paged_attention(q, pages, layer, tables, lengths, scale)
    last_page, offset = tables[1, (length - 1) // PAGE_POSITIONS], (length - 1) % PAGE_POSITIONS
    pages[last_page, layer, 0, 1, offset] = value  # its keys of KV head 1, which heads 2 and 3 read
    attended = paged_attention(q, pages, layer, tables, lengths, scale)
    assert attended[1, 2:].isnan().all()
    assert torch.equal(attended[1, :2], expected[1, :2])
    assert torch.equal(attended[[0, 2]], expected[[0, 2]])


def test_spoiled_values_and_queries_spoil_what_reads_them() -> None:
    q, pages, layer, tables, lengths, scale = draw([20, 700])
    pages[tables[1, 3], layer, 1, 0, 5, 7] = math.nan
    q[0, 3, 2] = math.nan
    assert_equals_reference((q, pages, layer, tables, lengths, scale))
    is_spoiled = paged_attention(q, pages, layer, tables, lengths, scale).isnan()
    assert is_spoiled[0].sum(dim=1).tolist() == [0, 0, 0, 16]
    assert is_spoiled[1].sum(dim=1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("num_hidden", [16, 512, 600, 700])
def test_minus_infinite_logits_weigh_nothing(num_hidden: int) -> None:
    q, pages, layer, tables, lengths, scale = draw([700])
    q = q.abs()
    for position in range(num_hidden):  # whole pages and a whole piece of them
        pages[tables[0, position // PAGE_POSITIONS], layer, 0, :, position % PAGE_POSITIONS] = -math.inf
    assert_equals_reference((q, pages, layer, tables, lengths, scale))
    assert paged_attention(q, pages, layer, tables, lengths, scale).isnan().all() == (num_hidden == 700)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    q, pages, layer, tables, lengths, scale, bias = with_bias(draw([20, 0, 100]))
    attended = paged_attention(layout(q), pages, layer, layout(tables), layout(lengths), scale, layout(bias))
    assert torch.equal(attended, paged_attention(q, pages, layer, tables, lengths, scale, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [10, 16])
def test_reads_only_its_inputs(head_dim: int, dtype: torch.dtype) -> None:
    q, pages, layer, tables, lengths, scale, bias = with_bias(draw([20, 48], head_dim=head_dim, dtype=dtype))
    expected = paged_attention(q, pages, layer, tables, lengths, scale, bias)
    for offset in range(18):
        q_view, q_buffer = misaligned(q, offset, math.nan)
        pages_view, pages_buffer = misaligned(pages, offset, math.nan)
        table, _ = misaligned(tables, offset, -1)
        counts, _ = misaligned(lengths, offset, -1)
        added, _ = misaligned(bias, offset, math.nan)
        before = q_buffer.clone(), pages_buffer.clone()
        attended = paged_attention(q_view, pages_view, layer, table, counts, scale, added)
        torch.testing.assert_close(attended, expected, **PAGED_ATTENTION[dtype])
        torch.testing.assert_close((q_buffer, pages_buffer), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_gets_the_same_bits_alone_and_in_any_company(dtype: torch.dtype) -> None:
    q, pages, layer, tables, lengths, scale, bias = with_bias(draw([*EDGES, 1600], head_dim=64, dtype=dtype))

    def attend(rows: Tensor) -> Tensor:
        return paged_attention(q[rows], pages, layer, tables[rows], lengths[rows], scale, bias[rows])

    everyone = torch.arange(len(q))
    together = attend(everyone)
    for row in everyone:
        assert torch.equal(attend(row[None])[0], together[row])
    assert torch.equal(attend(everyone.flip(0)).flip(0), together)


@pytest.mark.parametrize("lengths", [[1600], [*EDGES, 1600]])
def test_any_number_of_threads_gives_the_same_bits(lengths: list[int]) -> None:
    inputs = draw(lengths, head_dim=64)
    alone = paged_attention(*inputs)
    for num_threads in (2, 3, 7):
        with threads(num_threads):
            assert torch.equal(paged_attention(*inputs), alone)


Q, P = torch.zeros(2, 4, 8), torch.zeros(3, 4, 2, 2, PAGE_POSITIONS, 8)
T, L = torch.zeros(2, 2, dtype=torch.int32), torch.tensor([32, 17], dtype=torch.int32)
PAGES = (
    "pages must be float32, bfloat16 or float16 [P, G, 2, Hkv, 16, Dh], "
    "or int8 [P, G, 2, Hkv, 16, Dh + 2] on a CPU, got"
)
LIKE = "q must be float32 [B, H, 8] like pages, got"
MULTIPLE = "H must be a multiple of Hkv, both at least 1, got"
NO_HEADS, NO_DIM = torch.zeros(3, 4, 2, 0, PAGE_POSITIONS, 8), torch.zeros(3, 4, 2, 2, PAGE_POSITIONS, 0)
REFUSALS: list[tuple[Inputs, str]] = [
    ((Q, P.double(), 0, T, L, 1.0), f"{PAGES} float64 [3, 4, 2, 2, 16, 8]"),
    ((Q, P[0], 0, T, L, 1.0), f"{PAGES} float32 [4, 2, 2, 16, 8]"),
    ((Q, P[:, :, :1], 0, T, L, 1.0), f"{PAGES} float32 [3, 4, 1, 2, 16, 8]"),
    ((Q, P[..., :8, :], 0, T, L, 1.0), f"{PAGES} float32 [3, 4, 2, 2, 8, 8]"),
    ((Q, P[:, :2], 0, T, L, 1.0), "pages must be contiguous"),
    ((Q, P, -1, T, L, 1.0), "layer must be in [0, 4), got -1"),
    ((Q, P, 4, T, L, 1.0), "layer must be in [0, 4), got 4"),
    ((Q.half(), P, 0, T, L, 1.0), f"{LIKE} float16 [2, 4, 8]"),
    ((Q[..., :7], P, 0, T, L, 1.0), f"{LIKE} float32 [2, 4, 7]"),
    ((Q[0], P, 0, T, L, 1.0), f"{LIKE} float32 [4, 8]"),
    ((Q[:, :3], P, 0, T, L, 1.0), f"{MULTIPLE} H=3, Hkv=2"),
    ((Q[:, :0], P, 0, T, L, 1.0), f"{MULTIPLE} H=0, Hkv=2"),
    ((Q, NO_HEADS, 0, T, L, 1.0), f"{MULTIPLE} H=4, Hkv=0"),
    ((Q[..., :0], NO_DIM, 0, T, L, 1.0), "Dh must be at least 1, got 0"),
    ((Q, P, 0, T.long(), L, 1.0), "tables must be int32 [B, max_pages], got int64 [2, 2]"),
    ((Q, P, 0, T[0], L, 1.0), "tables must be int32 [B, max_pages], got int32 [2]"),
    ((Q, P, 0, T[:1], L, 1.0), "tables must have B=2 rows like q, got 1"),
    ((Q, P, 0, T, L.long(), 1.0), "lengths must be int32 [B], got int64 [2]"),
    ((Q, P, 0, T, L[None], 1.0), "lengths must be int32 [B], got int32 [1, 2]"),
    ((Q, P, 0, T, L[:1], 1.0), "lengths must have B=2 entries like q, got 1"),
    ((Q, P, 0, T, L, math.nan), "scale must be finite, got nan"),
]
REFUSED_VALUES: list[tuple[Inputs, str]] = [
    ((Q, P, 0, T, L - 18, 1.0), "lengths[1] must be in [0, 32], got -1"),
    ((Q, P, 0, T, L + 1, 1.0), "lengths[0] must be in [0, 32], got 33"),
    ((Q, P, 0, T + torch.tensor([0, 3]).int(), L, 1.0), "tables[0, 1] must be in [0, 3), got 3"),
    ((Q, P, 0, T - torch.tensor([[0], [1]]).int(), L, 1.0), "tables[1, 0] must be in [0, 3), got -1"),
]


test_refuses_with_its_reason = refusing(paged_attention, REFUSALS)
test_refuses_values_with_its_reason = refusing(paged_attention, REFUSED_VALUES, "checked_values")


B = torch.zeros(2, 32)
BIAS_REFUSALS: list[tuple[Tensor, str]] = [
    (B.half(), "must be float32 [B, max_pages * 16], got float16 [2, 32]"),
    (B[0], "must be float32 [B, max_pages * 16], got float32 [32]"),
    (B[:1], "must be [B=2, max_pages * 16=32], got float32 [1, 32]"),
    (B[:, :31], "must be [B=2, max_pages * 16=32], got float32 [2, 31]"),
]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("bias", "message"), BIAS_REFUSALS)
def test_refuses_a_bias_with_its_reason(bias: Tensor, message: str) -> None:
    assert_refused(paged_attention, (Q, P, 0, T, L, 1.0, bias), f"bias {message}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = draw([20, 0, 40], dtype=dtype)
    torch.library.opcheck(torch.ops.trimserve.paged_attention.default, inputs)
    torch.library.opcheck(torch.ops.trimserve.paged_attention.default, with_bias(inputs))
