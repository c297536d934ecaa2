"""attention: tables by hand, equality with the reference and with torch, edges, refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.arrays import LAYOUTS, AttentionInputs, draw_attention, misaligned, threads
from tests.ops.refusals import assert_refused
from tests.tolerances import MANY_ROWS_ATTENTION, PAGED_ATTENTION
from trimserve.ops import attention, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_KEYS = 128


def everything(num_rows: int, num_keys: int) -> Tensor:
    """Every row sees every key."""
    return torch.tensor([[0, num_keys]], dtype=torch.int32).expand(num_rows, 2)


def assert_equals_reference(inputs: AttentionInputs) -> None:
    attended, log_sums = attention(*inputs)
    expected, expected_sums = reference.attention(*inputs)
    torch.testing.assert_close(attended, expected, equal_nan=True, **MANY_ROWS_ATTENTION[attended.dtype])
    torch.testing.assert_close(log_sums, expected_sums, equal_nan=True, **PAGED_ATTENTION[torch.float32])


LN3 = math.log(3)
TABLE = [  # query of one head (Dh = 1), keys, values, range, bias, attended, log of the sum
    (1.0, [0.0, LN3], [4.0, 8.0], (0, 2), None, 7.0, math.log(4)),
    (-1.0, [0.0, LN3], [4.0, 8.0], (0, 2), None, 5.0, math.log(4 / 3)),
    (1.0, [9.0, 0.0, LN3], [1.0, 4.0, 8.0], (1, 3), None, 7.0, math.log(4)),  # only what the row sees
    (5.0, [2.0], [8.0], (0, 1), None, 8.0, 10.0),
    (5.0, [2.0], [8.0], (1, 1), None, 0.0, -math.inf),
    (0.0, [9.0, 9.0], [4.0, 8.0], (0, 2), [0.0, LN3], 7.0, math.log(4)),
    (0.0, [9.0, 9.0], [4.0, 8.0], (0, 2), [-math.inf, LN3], 8.0, LN3),
    (0.0, [1.0] * 300, [1.0] * 299 + [301.0], (0, 300), None, 2.0, math.log(300)),  # three blocks of keys
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("query", "keys", "values", "seen", "bias", "attended", "log_sum"), TABLE)
def test_hand_worked_attention(
    query: float,
    keys: list[float],
    values: list[float],
    seen: tuple[int, int],
    bias: list[float] | None,
    attended: float,
    log_sum: float,
    dtype: torch.dtype,
) -> None:
    q, k, v = (torch.tensor(part, dtype=dtype).view(-1, 1, 1) for part in (query, keys, values))
    op = attention if dtype == torch.float32 else reference.attention
    rows = torch.tensor([seen], dtype=torch.int32)
    found, log_sums = op(q, k, v, rows, 1.0, None if bias is None else torch.tensor(bias))
    torch.testing.assert_close(found.item(), attended, **PAGED_ATTENTION[torch.float32])
    torch.testing.assert_close(log_sums.item(), log_sum, **PAGED_ATTENTION[torch.float32])


def test_query_heads_share_their_group_s_kv_head() -> None:
    v = torch.tensor([3.0, 5.0]).view(1, 2, 1)
    attended, _ = attention(torch.ones(1, 4, 1), torch.zeros(1, 2, 1), v, everything(1, 1), 1.0)
    assert attended.flatten().tolist() == [3, 3, 5, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_keys", "num_heads", "num_kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 1),
        (0, 5, 2, 1, 8),
        (3, 0, 2, 1, 8),
        (7, BLOCK_KEYS + 1, 8, 2, 16),
        (49, 2 * BLOCK_KEYS, 6, 6, 24),  # one row more than a tile
        (100, 401, 8, 2, 80),  # one block of rows and a part of the next
        (300, 129, 1, 1, 13),
        (20, 300, 8, 1, 128),
    ],
)
def test_equals_reference(
    num_rows: int, num_keys: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = draw_attention(num_rows, num_keys, num_heads, num_kv_heads, head_dim, dtype)
    assert_equals_reference(inputs)
    assert_equals_reference((*inputs[:5], None))


@given(
    num_rows=st.integers(0, 120),
    num_keys=st.integers(0, 300),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    num_rows: int, num_keys: int, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    assert_equals_reference(
        draw_attention(num_rows, num_keys, group * num_kv_heads, num_kv_heads, head_dim, dtype, seed)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_ranges_equal_torch_s_attention(dtype: torch.dtype) -> None:
    q, k, v, _, scale, _ = draw_attention(300, 300, 4, 4, 32, dtype)
    rows = torch.arange(300, dtype=torch.int32)
    attended, _ = attention(q, k, v, torch.stack([torch.zeros_like(rows), rows + 1], dim=1), scale)
    queries, keys, values = (part.double().transpose(0, 1) for part in (q, k, v))
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale).transpose(0, 1)
    torch.testing.assert_close(attended, expected.to(dtype), **MANY_ROWS_ATTENTION[dtype])


def test_large_logits_do_not_overflow() -> None:
    q, k, v, ranges, _, _ = draw_attention(60, 300)
    for scale in (1000.0, -1000.0):
        assert_equals_reference((q, k, v, ranges, scale, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoiled_key_spoils_only_the_rows_that_see_it(value: float, dtype: torch.dtype) -> None:
    q, k, v, _, scale, _ = draw_attention(2, 300, dtype=dtype)
    k[250] = value
    ranges = torch.tensor([[0, 250], [100, 300]], dtype=torch.int32)
    attended, log_sums = attention(q, k, v, ranges, scale)
    assert attended[0].isfinite().all()
    assert log_sums[:, 0].isfinite().all()
    assert attended[1].isnan().all()


def test_a_spoiled_query_spoils_only_its_row_and_head() -> None:
    q, k, v, ranges, scale, _ = draw_attention(60, 40)
    ranges[5] = torch.tensor([0, 40])
    expected, _ = attention(q, k, v, ranges, scale)
    q[5, 3, 2] = math.nan
    attended, _ = attention(q, k, v, ranges, scale)
    assert attended[5, 3].isnan().all()
    attended[5, 3] = expected[5, 3]
    assert torch.equal(attended, expected)


def test_minus_infinite_logits_weigh_nothing() -> None:
    q, k, v, _, scale, _ = draw_attention(60, 300)
    bias = torch.zeros(300)
    bias[:200] = -math.inf  # a whole block of keys and a part of the next
    attended, log_sums = attention(q, k, v, everything(60, 300), scale, bias)
    expected = attention(q, k[200:], v[200:], everything(60, 100), scale)
    torch.testing.assert_close((attended, log_sums), expected, **PAGED_ATTENTION[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    q, k, v, ranges, scale, bias = draw_attention(9, 140)
    assert bias is not None
    found = attention(layout(q), layout(k), layout(v), layout(ranges), scale, layout(bias))
    for part, expected in zip(found, attention(q, k, v, ranges, scale, bias), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_only_its_inputs(dtype: torch.dtype) -> None:
    q, k, v, ranges, scale, bias = draw_attention(9, 137, head_dim=13, dtype=dtype)
    assert bias is not None
    expected, expected_sums = attention(q, k, v, ranges, scale, bias)
    for offset in range(18):
        placed = [misaligned(each, offset, 7) for each in (q, k, v, ranges, bias)]
        views, before = [view for view, _ in placed], [buffer.clone() for _, buffer in placed]
        attended, log_sums = attention(views[0], views[1], views[2], views[3], scale, views[4])
        assert torch.equal(attended, expected)
        assert torch.equal(log_sums, expected_sums)
        assert all(torch.equal(buffer, old) for (_, buffer), old in zip(placed, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_alone_and_in_any_company(dtype: torch.dtype) -> None:
    q, k, v, ranges, scale, bias = draw_attention(130, 300, head_dim=40, dtype=dtype)
    attended, log_sums = attention(q, k, v, ranges, scale, bias)
    for some in (torch.tensor([7]), torch.arange(100, 117), torch.arange(129, -1, -1)):
        of_some, sums_of_some = attention(q[some], k, v, ranges[some], scale, bias)
        assert torch.equal(of_some, attended[some])
        assert torch.equal(sums_of_some, log_sums[:, some])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = draw_attention(300, 260)
    alone = attention(*inputs)
    with threads(3):
        assert all(map(torch.equal, attention(*inputs), alone))


Q, K, R = torch.zeros(3, 4, 8), torch.zeros(5, 2, 8), torch.zeros(3, 2, dtype=torch.int32)
REFUSALS: list[tuple[AttentionInputs, str]] = [
    ((Q.double(), K, K, R, 1.0, None), "q must be float32, bfloat16 or float16 [T, H, Dh], got float64 [3, 4, 8]"),
    ((Q, K[..., :7], K, R, 1.0, None), "k must be float32 [N, Hkv, 8] like q, got float32 [5, 2, 7]"),
    ((Q, K, K.half(), R, 1.0, None), "v must be float32 [N, Hkv, Dh] like k, got float16 [5, 2, 8]"),
    ((Q, K, K[:4], R, 1.0, None), "v must be float32 [N, Hkv, Dh] like k, got float32 [4, 2, 8]"),
    ((Q[:, :3], K, K, R, 1.0, None), "H must be a multiple of Hkv, both at least 1, got H=3, Hkv=2"),
    ((Q, K, K, R[:2], 1.0, None), "visibility must have T=3 rows like q, got 2"),
    ((Q, K, K, R - 1, 1.0, None), "visibility[0] must be a range within [0, 5], got [-1, -1]"),
    ((Q, K, K, R + 6, 1.0, None), "visibility[0] must be a range within [0, 5], got [6, 6]"),
    ((Q, K, K, R, math.nan, None), "scale must be finite, got nan"),
    ((Q, K, K, R, 1.0, torch.zeros(4)), "bias must be float32 [N] like k, got float32 [4]"),
    ((Q, K, K, R, 1.0, torch.zeros(5).half()), "bias must be float32 [N] like k, got float16 [5]"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refuses_with_its_reason(arguments: AttentionInputs, message: str) -> None:
    assert_refused(attention, arguments, message)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.attention.default, draw_attention(5, 40, dtype=dtype))
