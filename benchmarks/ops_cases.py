"""What is timed: each op at the geometry of Llama-3.2-Vision 11B beside what a PyTorch user would write.

Attention also at the heads of `bench_geometry.json`, the model whose decode steps are measured. A case is made only
after the op was found equal to its reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mllama.modeling_mllama import repeat_kv

from benchmarks.measure import Floor
from tests.tolerances import HEADWISE_SCORES, LINEAR, MANY_ROWS_ATTENTION, PAGED_ATTENTION
from trimserve import ops
from trimserve.model import huge_pages
from trimserve.model.int8 import to_int8
from trimserve.model.quantization import multiply_int8
from trimserve.ops import PAGE_POSITIONS, reference

__all__ = ["GEOMETRY", "Case", "make_cases"]

_ROWS, _FEATURES, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 4 * 1601, 32, 8, 128
_PICKS = 1281  # k_ratio 0.2
_BATCH = 8
_TEXT_LENGTH = 128
_SCALE = _HEAD_DIM**-0.5
_SHAPE = (_ROWS, _FEATURES, _HEADS, _KV_HEADS, _HEAD_DIM, _PICKS, _BATCH)
GEOMETRY: Final = dict(zip(("T", "N", "H", "Hkv", "Dh", "K", "B"), _SHAPE, strict=True))


class _Heads(NamedTuple):
    """Of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


_VISION_ROWS, _PROMPT_ROWS = 4 * 1608, 2048
_HEADS_VISION = _Heads(16, 16, 80)
_HEADS_11B, _HEADS_BENCH = _Heads(_HEADS, _KV_HEADS, _HEAD_DIM), _Heads(16, 4, 64)


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one size."""

    op: str
    detail: str
    """What tells it from other cases of the op; may be empty."""
    dtype: torch.dtype
    run: Callable[[], Any]
    baseline: Callable[[], Any]
    baseline_name: str
    num_bytes: int
    """Least traffic with memory."""
    floor: Floor | None
    """Whose bandwidth bounds it; None: bound by arithmetic."""
    matrix_bytes: int | None = None
    """Of the intermediate tensor that the op does without; its peak extra memory is then measured."""


def make_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Cases of all ops on the default device, one after another, so that only one holds its tensors.

    Raises:
        AssertionError: an op differs from its reference.
    """
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(0)
    yield from _selection_cases(dtype, generator)
    yield from _writing_cases(dtype, generator)
    for length in (_FEATURES // 2, _FEATURES):
        yield _paged_attention_case(dtype, generator, _HEADS_11B, _BATCH, length)
    for batch in (1, _BATCH):
        for length in (_TEXT_LENGTH, _FEATURES // 2):
            yield _paged_attention_case(dtype, generator, _HEADS_BENCH, batch, length)
    if device.type == "cpu":  # of ops that have no CUDA kernel
        yield _attention_case(dtype, generator, _HEADS_VISION, _VISION_ROWS, is_causal=False)
        yield _attention_case(dtype, generator, _HEADS_11B, _PROMPT_ROWS, is_causal=True)
        yield from _linear_cases(dtype, generator)


def _linear_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    """At the numbers of rows of decode steps, and at and beyond the limits of model/projection.py."""
    for num_rows in (1, _BATCH, 2 * _BATCH):
        for int8 in (False, True):
            yield _linear_case(dtype, generator, num_rows, int8=int8)
    if dtype == torch.float32:
        small = _HEADS * _HEAD_DIM // 4  # so that so many rows take no minutes
        for int8 in (False, True):
            yield _linear_case(dtype, generator, 512, small, int8=int8)
    else:
        yield _linear_case(dtype, generator, 4 * _BATCH)
        for num_rows in (4 * _BATCH, 8 * _BATCH):
            yield _linear_case(dtype, generator, num_rows, int8=True)


def _draw(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def _on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy that lies as weights and pages of KV do."""
    return huge_pages.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def _selection_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    q = _draw(_ROWS, _HEADS, _HEAD_DIM, dtype=dtype, generator=generator)
    keys = _draw(_FEATURES, _KV_HEADS, _HEAD_DIM, dtype=dtype, generator=generator)
    visibility = torch.tensor([[0, _FEATURES]], dtype=torch.int32).expand(_ROWS, 2)
    scores = ops.headwise_scores(q, keys, visibility, _SCALE)
    expected = reference.headwise_scores(q, keys, visibility, _SCALE)
    torch.testing.assert_close(scores, expected, **HEADWISE_SCORES)
    yield Case(
        "headwise_scores",
        "",
        dtype,
        lambda: ops.headwise_scores(q, keys, visibility, _SCALE),
        lambda: _scores_in_torch(q, keys),
        "bmm + softmax + mean",
        q.nbytes + keys.nbytes + scores.nbytes,
        None,
        4 * _HEADS * _ROWS * _FEATURES,
    )
    if dtype == torch.float32:  # scores are float32 whatever the model's dtype is
        yield from _pick_cases(scores)


def _scores_in_torch(q: Tensor, k: Tensor) -> Tensor:
    """When every row sees every feature: two batched ops and a mean."""
    keys = k.permute(1, 2, 0).repeat_interleave(_HEADS // _KV_HEADS, dim=0)  # [H, Dh, N]
    weights: Tensor = (torch.bmm(q.transpose(0, 1), keys).float() * _SCALE).softmax(dim=-1)
    scores: Tensor = weights.mean(dim=1)
    return scores


def _pick_cases(scores: Tensor) -> Iterator[Case]:
    segments, k = [_FEATURES], [_PICKS]
    picks = ops.headwise_topk(scores, segments, k)
    assert torch.equal(picks, reference.headwise_topk(scores, segments, k))
    kept, _ = ops.union_indices(picks, _FEATURES)
    assert torch.equal(kept, reference.union_indices(picks, _FEATURES)[0])
    assert torch.equal(kept, ops.select_features(scores, segments, k)[0])

    def case(op: str, run: Callable[[], Any], baseline: Callable[[], Any], name: str, num_bytes: int) -> Case:
        return Case(op, "", scores.dtype, run, baseline, name, num_bytes, None)

    yield case(
        "headwise_topk",
        lambda: ops.headwise_topk(scores, segments, k),
        lambda: scores.topk(_PICKS).indices.sort().values,
        "topk + sort",
        scores.nbytes + picks.nbytes,
    )
    yield case(
        "union_indices",
        lambda: ops.union_indices(picks, _FEATURES),
        lambda: picks.unique(),
        "unique",
        picks.nbytes + kept.nbytes,
    )
    yield case(
        "select_features",
        lambda: ops.select_features(scores, segments, k),
        lambda: scores.topk(_PICKS).indices.unique(),
        "topk + unique",
        scores.nbytes + kept.nbytes,
    )


def _writing_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[Case]:
    rows = _FEATURES // 2
    keys, values = _draw(2, _FEATURES, _KV_HEADS, _HEAD_DIM, dtype=dtype, generator=generator)
    kept = torch.randperm(_FEATURES, generator=generator)[:rows].sort().values
    shape = (-(-rows // PAGE_POSITIONS), 1, 2, _KV_HEADS, PAGE_POSITIONS, _HEAD_DIM)
    pages = _on_huge_pages(torch.zeros(shape, dtype=dtype))
    order = torch.randperm(len(pages), generator=generator)
    position = torch.arange(rows)
    slots = order[position // PAGE_POSITIONS] * PAGE_POSITIONS + position % PAGE_POSITIONS

    def case(name: str, detail: str, *arguments: Tensor) -> Case:
        ours, theirs = getattr(ops, name), getattr(reference, name)
        expected = torch.zeros_like(pages)
        theirs(expected, 0, *arguments)
        ours(pages.zero_(), 0, *arguments)
        assert torch.equal(pages, expected)
        run, baseline = (lambda: ours(pages, 0, *arguments)), (lambda: theirs(pages, 0, *arguments))
        num_bytes = 2 * rows * (keys[0].nbytes + values[0].nbytes)
        return Case(name, detail, dtype, run, baseline, "advanced indexing", num_bytes, "copy")

    yield case("write_kv", f"{rows} rows", keys[:rows], values[:rows], slots)
    yield case("gather_kv", "half kept", keys, values, kept, slots)


def _paged_attention_case(
    dtype: torch.dtype, generator: torch.Generator, heads: _Heads, batch: int, length: int
) -> Case:
    scale, per_sequence = heads.head_dim**-0.5, -(-length // PAGE_POSITIONS)
    q = _draw(batch, heads.num_heads, heads.head_dim, dtype=dtype, generator=generator)
    shape = (batch * per_sequence, 1, 2, heads.num_kv_heads, PAGE_POSITIONS, heads.head_dim)
    pages = _on_huge_pages(_draw(*shape, dtype=dtype, generator=generator))
    tables = torch.randperm(len(pages), generator=generator, dtype=torch.int32).view(batch, per_sequence)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    arguments = (q, pages, 0, tables, lengths, scale)
    attended = ops.paged_attention(*arguments)
    expected = reference.paged_attention(q[:1], pages, 0, tables[:1], lengths[:1], scale)
    torch.testing.assert_close(attended[:1], expected, **PAGED_ATTENTION[dtype])
    # The same keys and values as transformers caches them, [B, Hkv, length, Dh].
    together = pages[tables.long(), 0].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :length, :].contiguous()
    keys, values = together
    torch.testing.assert_close(_attention_in_torch(q, keys, values), attended, rtol=1e-2, atol=1e-2)
    of_bench = f", batch {batch} of bench" if heads is _HEADS_BENCH else ""
    return Case(
        "paged_attention",
        f"length {length}{of_bench}",
        dtype,
        lambda: ops.paged_attention(*arguments),
        lambda: _attention_in_torch(q, keys, values),
        "repeat_kv + sdpa",
        together.nbytes,
        "read" if length > _TEXT_LENGTH else None,  # so few bytes take less time than the call
    )


def _attention_case(
    dtype: torch.dtype, generator: torch.Generator, heads: _Heads, num_rows: int, *, is_causal: bool
) -> Case:
    """The vision encoder of an image of four tiles, or a prompt."""
    scale = heads.head_dim**-0.5
    q = _draw(num_rows, heads.num_heads, heads.head_dim, dtype=dtype, generator=generator)
    k, v = _draw(2, num_rows, heads.num_kv_heads, heads.head_dim, dtype=dtype, generator=generator)
    rows = torch.arange(num_rows, dtype=torch.int32)
    ends = rows + 1 if is_causal else torch.full_like(rows, num_rows)
    visibility = torch.stack([torch.zeros_like(rows), ends], dim=1)
    attended, _ = ops.attention(q, k, v, visibility, scale)
    some = torch.randint(num_rows, (16,), generator=generator)
    expected, _ = reference.attention(q[some], k, v, visibility[some], scale)
    torch.testing.assert_close(attended[some], expected, **MANY_ROWS_ATTENTION[dtype])
    queries, keys, values = (part.transpose(0, 1)[None].contiguous() for part in (q, k, v))
    has_groups = heads.num_heads != heads.num_kv_heads
    return Case(
        "attention",
        f"{num_rows} rows of a {'prompt' if is_causal else 'vision encoder'}",
        dtype,
        lambda: ops.attention(q, k, v, visibility, scale),
        lambda: F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=has_groups),
        "sdpa",
        2 * q.nbytes + k.nbytes + v.nbytes,
        None,
    )


def _linear_case(
    dtype: torch.dtype, generator: torch.Generator, num_rows: int, size: int = _HEADS * _HEAD_DIM, *, int8: bool = False
) -> Case:
    """int8 beside what model/projection.py does on a GPU."""
    x, weight = (_draw(n, size, dtype=dtype, generator=generator) for n in (num_rows, size))
    stored = to_int8(weight) if int8 else (_on_huge_pages(weight),)
    product = ops.linear(x, *stored)
    torch.testing.assert_close(product, reference.linear(x, *stored), **LINEAR[dtype])
    return Case(
        "linear",
        f"{num_rows} rows of {size}{', int8 weights' if int8 else ''}",
        dtype,
        lambda: ops.linear(x, *stored),
        (lambda: multiply_int8(x, *stored)) if int8 else (lambda: F.linear(x, *stored)),
        "weights made floats + linear" if int8 else "linear",
        x.nbytes + sum(tensor.nbytes for tensor in stored) + product.nbytes,
        "read" if num_rows == 1 else None,
    )


def _attention_in_torch(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As transformers' sdpa attention does it for models with grouped heads and a mask."""
    group = q.shape[1] // keys.shape[1]
    keys, values = repeat_kv(keys, group), repeat_kv(values, group)
    attended: Tensor = F.scaled_dot_product_attention(q[:, :, None], keys, values)
    return attended[:, :, 0]
