"""gather_kv: a table by hand, equality with the reference, edges, refusals."""

from collections.abc import Callable
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned
from trimserve.ops import gather_kv, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(
    num_features: int,
    num_kept: int,
    dim: int = 12,
    num_kv_heads: int = 2,
    head_dim: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_features, dim, generator=generator).to(dtype)
    keys, values = torch.randn(2, num_features, num_kv_heads, head_dim, generator=generator).to(dtype)
    kept = torch.randint(0, max(num_features, 1), (num_kept,), generator=generator)
    return features, keys, values, kept


def assert_equals_reference(inputs: Inputs) -> None:
    for result, expected in zip(gather_kv(*inputs), reference.gather_kv(*inputs), strict=True):
        assert result.is_contiguous()
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("op", [gather_kv, reference.gather_kv])
def test_copies_the_kept_rows_in_their_order(op: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    rows = torch.tensor([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]])
    features, keys, values = op(rows, rows.view(3, 1, 2), -rows.view(3, 1, 2), torch.tensor([0, 2, 2]))
    assert features.tolist() == [[0.0, 1.0], [20.0, 21.0], [20.0, 21.0]]
    assert keys.tolist() == [[[0.0, 1.0]], [[20.0, 21.0]], [[20.0, 21.0]]]
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_features", "num_kept"), [(1, 1), (65, 20), (65, 65), (65, 0), (0, 0), (5, 900)])
def test_equals_reference(num_features: int, num_kept: int, dtype: torch.dtype) -> None:
    assert_equals_reference(draw(num_features, num_kept, dtype=dtype))


@given(
    num_features=st.integers(1, 50),
    num_kept=st.integers(0, 60),
    dim=st.integers(0, 40),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    num_features: int,
    num_kept: int,
    dim: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    assert_equals_reference(draw(num_features, num_kept, dim, num_kv_heads, head_dim, dtype, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    features, keys, values, kept = draw(30, 12)
    assert_equals_reference((layout(features), layout(keys), layout(values), kept.repeat_interleave(2)[::2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_only_its_inputs(dtype: torch.dtype) -> None:
    inputs = draw(30, 12, dtype=dtype)
    for offset in range(18):
        moved = [misaligned(tensor, offset, nan) for tensor in inputs[:3]]
        before = [buffer.clone() for _, buffer in moved]
        (features, _), (keys, _), (values, _) = moved
        kept, _ = misaligned(inputs[3], offset, -7)
        results = gather_kv(features, keys, values, kept)
        for result, expected in zip(results, reference.gather_kv(*inputs), strict=True):
            assert torch.equal(result, expected)
        after = [buffer for _, buffer in moved]
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_threads_copy_disjoint_rows() -> None:
    inputs = draw(1000, 900, dim=512, num_kv_heads=2, head_dim=64)
    torch.set_num_threads(3)
    try:
        assert_equals_reference(inputs)
    finally:
        torch.set_num_threads(1)


F, KV, M = torch.zeros(5, 6), torch.zeros(5, 2, 8), torch.zeros(3, dtype=torch.int64)
REFUSALS: list[tuple[Inputs, str]] = [
    ((F.double(), KV, KV, M), "features must be float32, bfloat16 or float16 [N, D], got float64 [5, 6]"),
    ((F[0], KV, KV, M), "features must be float32, bfloat16 or float16 [N, D], got float32 [6]"),
    ((F, KV.half(), KV, M), "keys must be float32 [5, Hkv, Dh] like features, got float16 [5, 2, 8]"),
    ((F, KV[:4], KV, M), "keys must be float32 [5, Hkv, Dh] like features, got float32 [4, 2, 8]"),
    ((F, KV, KV[:, 0], M), "values must be float32 [5, Hkv, Dh] like features, got float32 [5, 8]"),
    (
        (F, KV, KV[:, :1], M),
        "values must have the shape of keys, got float32 [5, 1, 8] and float32 [5, 2, 8]",
    ),
    ((F, KV, KV, M.int()), "kept must be int64 [M], got int32 [3]"),
    ((F, KV, KV, M[None]), "kept must be int64 [M], got int64 [1, 3]"),
    ((F, KV, KV, M + 5), "kept must be in [0, 5), got 5"),
    ((F, KV, KV, M - 1), "kept must be in [0, 5), got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refuses_with_its_reason(arguments: Inputs, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        gather_kv(*arguments)
    assert str(error.value) == f"gather_kv: {message}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.trimserve.gather_kv.default, draw(30, 12, dtype=dtype))
