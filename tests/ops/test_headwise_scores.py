"""headwise_scores: tables by hand, equality with the reference, edges, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, draw_attention, misaligned, threads
from tests.ops.refusals import refusing
from tests.tolerances import HEADWISE_SCORES
from trimserve.ops import headwise_scores, reference

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor, float]


def draw(*sizes: Any, **others: Any) -> Inputs:
    """What `draw_attention` makes of the same, without values and bias."""
    q, k, _, visibility, scale, _ = draw_attention(*sizes, **others)
    return q, k, visibility, scale


def assert_equals_reference(inputs: Inputs) -> None:
    scores = headwise_scores(*inputs)
    expected = reference.headwise_scores(*inputs)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, equal_nan=True, **HEADWISE_SCORES)


LN3 = math.log(3)
TABLE = [  # queries of one head (Dh = 1), keys, visibility, scores
    ([1.0], [0.0, LN3], [[0, 2]], [0.25, 0.75]),
    ([1.0, -1.0], [0.0, LN3], [[0, 2], [0, 2]], [0.5, 0.5]),  # (1/4 + 3/4) / 2 each
    ([1.0, 1.0], [0.0, LN3, 9.0], [[0, 2], [0, 1]], [0.625, 0.75, 0.0]),  # means over the rows that see it
    ([1.0], [0.0, LN3, 0.0], [[1, 3]], [0.0, 0.75, 0.25]),  # softmax over what the row sees only
    ([5.0], [2.0, 3.0], [[0, 0]], [0.0, 0.0]),  # a row that sees none
    ([5.0], [2.0], [[0, 1]], [1.0]),
    ([], [2.0, 3.0], [], [0.0, 0.0]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys", "visibility", "expected"), TABLE)
def test_hand_worked_scores(
    queries: list[float],
    keys: list[float],
    visibility: list[list[int]],
    expected: list[float],
    dtype: torch.dtype,
) -> None:
    q = torch.tensor(queries, dtype=dtype).view(-1, 1, 1)
    k = torch.tensor(keys, dtype=dtype).view(-1, 1, 1)
    ranges = torch.tensor(visibility, dtype=torch.int32).view(-1, 2)
    op = headwise_scores if dtype == torch.float32 else reference.headwise_scores
    torch.testing.assert_close(op(q, k, ranges, 1.0), torch.tensor([expected]), **HEADWISE_SCORES)


def test_scale_multiplies_the_logits() -> None:
    q, k = torch.tensor([2 * LN3]).view(1, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1)
    scores = headwise_scores(q, k, torch.tensor([[0, 2]], dtype=torch.int32), 0.5)
    torch.testing.assert_close(scores, torch.tensor([[0.25, 0.75]]), **HEADWISE_SCORES)


def test_query_heads_share_their_group_s_key_head() -> None:
    q = torch.ones(1, 4, 1)
    k = torch.tensor([[0.0, LN3], [LN3, 0.0]]).view(2, 2, 1)
    scores = headwise_scores(q, k, torch.tensor([[0, 2]], dtype=torch.int32), 1.0)
    expected = torch.tensor([[0.25, 0.75]] * 2 + [[0.75, 0.25]] * 2)
    torch.testing.assert_close(scores, expected, **HEADWISE_SCORES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_features", "num_heads", "num_kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 1),
        (0, 5, 2, 1, 8),
        (3, 0, 2, 1, 8),
        (7, 65, 8, 2, 16),
        (49, 33, 6, 6, 24),  # one row more than a block of rows
        (100, 260, 8, 1, 40),
        (64, 1601, 4, 1, 128),
        (130, 193, 2, 1, 64),  # past the 128 rows, and the 128 features, of a block on tensor cores
        (5, 129, 4, 2, 80),
        (33, 70, 1, 1, 136),  # too large a head for these
    ],
)
def test_equals_reference(
    num_rows: int, num_features: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    assert_equals_reference(draw(num_rows, num_features, num_heads, num_kv_heads, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_rows_see_an_image_each(dtype: torch.dtype) -> None:
    q, k, visibility, scale = draw(150, 257, head_dim=64, dtype=dtype)
    visibility[:40] = 0
    visibility[40:100] = torch.tensor([0, 130])
    visibility[100:] = torch.tensor([130, 257])
    assert_equals_reference((q, k, visibility, scale))


@given(
    num_rows=st.integers(0, 120),
    num_features=st.integers(0, 100),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    num_rows: int,
    num_features: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_heads = group * num_kv_heads
    assert_equals_reference(draw(num_rows, num_features, num_heads, num_kv_heads, head_dim, dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sums_of_attention_change_nothing_but_the_last_bits(dtype: torch.dtype) -> None:
    q, k, visibility, scale = draw(100, 260, 8, 2, 40, dtype)
    q[3, 1, 0] = math.nan
    _, log_sums = reference.attention(q, k, k, visibility, scale)
    found = headwise_scores(q, k, visibility, scale, log_sums)
    expected = reference.headwise_scores(q, k, visibility, scale)
    torch.testing.assert_close(found, expected, equal_nan=True, **HEADWISE_SCORES)


def test_large_logits_do_not_overflow() -> None:
    q, k, visibility, _ = draw(5, 40)
    scores = headwise_scores(q, k, visibility, 1000.0)
    assert scores.isfinite().all()
    assert_equals_reference((q, k, visibility, -1000.0))


def test_half_subnormals_count() -> None:
    q = torch.full((1, 1, 1), 2.0**14, dtype=torch.float16)
    k = torch.tensor([0.0, 2.0**-24, -(2.0**-24), 2.0**-15], dtype=torch.float16).view(4, 1, 1)
    assert_equals_reference((q, k, torch.tensor([[0, 4]], dtype=torch.int32), 1000.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_inputs_spoil_only_the_rows_that_see_them(value: float, dtype: torch.dtype) -> None:
    q, k, _, scale = draw(2, 40, dtype=dtype)
    k[35] = value
    visibility = torch.tensor([[0, 30], [25, 40]], dtype=torch.int32)
    assert_equals_reference((q, k, visibility, scale))
    scores = headwise_scores(q, k, visibility, scale)
    assert scores[:, :25].isfinite().all()
    assert scores[:, 25:].isnan().all() or value == -math.inf


def test_minus_infinite_logits_score_zero() -> None:
    q, k = torch.ones(1, 1, 1), torch.tensor([-math.inf, 0.0, 0.0]).view(3, 1, 1)
    scores = headwise_scores(q, k, torch.tensor([[0, 3]], dtype=torch.int32), 1.0)
    assert scores.tolist() == [[0.0, 0.5, 0.5]]


def test_all_rows_masked_scores_zero() -> None:
    q, k, _, scale = draw(60, 40)
    assert not headwise_scores(q, k, torch.zeros(60, 2, dtype=torch.int32), scale).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    q, k, visibility, scale = draw(9, 40)
    scores = headwise_scores(layout(q), layout(k), layout(visibility), scale)
    assert torch.equal(scores, headwise_scores(q, k, visibility, scale))


@pytest.mark.parametrize("head_dim", [10, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_only_its_inputs(dtype: torch.dtype, head_dim: int) -> None:
    q, k, visibility, scale = draw(9, 37, head_dim=head_dim, dtype=dtype)
    expected = headwise_scores(q, k, visibility, scale)
    for offset in range(18):
        q_view, q_buffer = misaligned(q, offset, math.nan)
        k_view, k_buffer = misaligned(k, offset, math.nan)
        ranges, _ = misaligned(visibility, offset, -1)
        before = q_buffer.clone(), k_buffer.clone()
        assert torch.equal(headwise_scores(q_view, k_view, ranges, scale), expected)
        torch.testing.assert_close((q_buffer, k_buffer), before, rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = draw(100, 260)
    alone = headwise_scores(*inputs)
    assert torch.equal(headwise_scores(*inputs), alone)
    with threads(3):
        assert torch.equal(headwise_scores(*inputs), alone)


Q, K, V = torch.zeros(3, 4, 8), torch.zeros(5, 2, 8), torch.zeros(3, 2, dtype=torch.int32)
REFUSALS: list[tuple[tuple[Tensor, Tensor, Tensor, float], str]] = [
    ((Q.double(), K, V, 1.0), "q must be float32, bfloat16 or float16 [T, H, Dh], got float64 [3, 4, 8]"),
    ((Q[0], K, V, 1.0), "q must be float32, bfloat16 or float16 [T, H, Dh], got float32 [4, 8]"),
    ((Q, K.half(), V, 1.0), "k must be float32 [N, Hkv, 8] like q, got float16 [5, 2, 8]"),
    ((Q, K[..., :7], V, 1.0), "k must be float32 [N, Hkv, 8] like q, got float32 [5, 2, 7]"),
    ((Q, K[0], V, 1.0), "k must be float32 [N, Hkv, 8] like q, got float32 [2, 8]"),
    ((Q[:, :3], K, V, 1.0), "H must be a multiple of Hkv, both at least 1, got H=3, Hkv=2"),
    ((Q, K[:, :0], V, 1.0), "H must be a multiple of Hkv, both at least 1, got H=4, Hkv=0"),
    ((Q[..., :0], K[..., :0], V, 1.0), "Dh must be at least 1, got 0"),
    ((Q, K, V.long(), 1.0), "visibility must be int32 [T, 2], got int64 [3, 2]"),
    ((Q, K, V[:, :1], 1.0), "visibility must be int32 [T, 2], got int32 [3, 1]"),
    ((Q, K, V[:2], 1.0), "visibility must have T=3 rows like q, got 2"),
    ((Q, K, V, math.inf), "scale must be finite, got inf"),
    (
        (Q, torch.zeros(1, 1, 1).expand(2**31, 2, 8), V, 1.0),
        "N must be at most 2147483647, got 2147483648",
    ),
]
REFUSED_VALUES: list[tuple[tuple[Tensor, Tensor, Tensor, float], str]] = [
    ((Q, K, V + torch.tensor([0, 6]).int(), 1.0), "visibility[0] must be a range within [0, 5], got [0, 6]"),
    ((Q, K, V - 1, 1.0), "visibility[0] must be a range within [0, 5], got [-1, -1]"),
    ((Q, K, V + torch.tensor([3, 2]).int(), 1.0), "visibility[0] must be a range within [0, 5], got [3, 2]"),
]


test_refuses_with_its_reason = refusing(headwise_scores, REFUSALS)
test_refuses_values_with_its_reason = refusing(headwise_scores, REFUSED_VALUES, "checked_values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.headwise_scores.default, draw(5, 40, dtype=dtype))
