"""What is timed: each op at the geometry of Llama-3.2-Vision 11B beside what a PyTorch user would write.

A case is made only after the op was found equal to its reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mllama.modeling_mllama import repeat_kv

from benchmarks.measure import Floor
from tests.tolerances import HEADWISE_SCORES, LINEAR, LINEAR_QUANTIZED, MANY_ROWS_ATTENTION, PAGED_ATTENTION
from trimserve import ops
from trimserve.model import huge_pages
from trimserve.model.int8 import to_int8
from trimserve.model.quantization import multiply_int8
from trimserve.ops import PAGE_POSITIONS, reference

__all__ = ["GEOMETRY", "Case", "make_cases"]

GEOMETRY: Final = {"T": 64, "N": 4 * 1601, "H": 32, "Hkv": 8, "Dh": 128, "K": 1281, "B": 8}  # K: k_ratio 0.2
_ROWS, _FEATURES, _HEADS, _KV_HEADS, _HEAD_DIM, _PICKS, _BATCH = GEOMETRY.values()
_SCALE: Final = _HEAD_DIM**-0.5
_TEXT_LENGTH, _VISION_ROWS, _PROMPT_ROWS = 128, 4 * 1608, 2048


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one size."""

    op: str
    detail: str
    """What tells it from other cases of the op; may be empty."""
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    baseline_name: str
    baseline: Callable[[], Any]
    num_bytes: int
    """Least traffic with memory."""
    floor: Floor | None = None
    """Whose bandwidth bounds it; None: bound by arithmetic."""

    def run(self) -> Any:
        """The op, once."""
        return getattr(ops, self.op)(*self.arguments)


def make_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Cases of all ops on the default device, one after another, so that only one holds its tensors.

    Raises:
        AssertionError: an op differs from its reference.
    """
    torch.manual_seed(0)
    yield from _selection_cases(dtype)
    yield from _writing_cases(dtype)
    for batch, length in product((1, _BATCH), (_TEXT_LENGTH, _FEATURES // 2)):
        yield _paged_attention_case(dtype, batch, length)
    if torch.get_default_device().type == "cpu":  # of ops that have no CUDA kernel
        yield _attention_case(dtype, (_VISION_ROWS, 16, 16, 80), is_causal=False)
        yield _attention_case(dtype, (_PROMPT_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM), is_causal=True)
        for num_rows, int8 in product((1, _BATCH, 4 * _BATCH), (False, True)):
            yield _linear_case(dtype, num_rows, int8=int8)


def _on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy that lies as weights and pages of KV do."""
    return huge_pages.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def _selection_cases(dtype: torch.dtype) -> Iterator[Case]:
    q = torch.randn(_ROWS, _HEADS, _HEAD_DIM, dtype=dtype)
    keys = torch.randn(_FEATURES, _KV_HEADS, _HEAD_DIM, dtype=dtype)
    visibility = torch.tensor([[0, _FEATURES]], dtype=torch.int32).expand(_ROWS, 2)
    arguments = (q, keys, visibility, _SCALE)
    scores = ops.headwise_scores(*arguments)
    torch.testing.assert_close(scores, reference.headwise_scores(*arguments), **HEADWISE_SCORES)
    moved, torch_scores = q.nbytes + keys.nbytes + scores.nbytes, partial(_scores_in_torch, q, keys)
    yield Case("headwise_scores", "", dtype, arguments, "bmm + softmax + mean", torch_scores, moved)
    if dtype != torch.float32:  # scores are float32 whatever the model's dtype is
        return
    picked = (scores, [_FEATURES], [_PICKS])
    picks = ops.headwise_topk(*picked)
    assert torch.equal(picks, reference.headwise_topk(*picked))
    kept, _ = ops.union_indices(picks, _FEATURES)
    assert torch.equal(kept, reference.union_indices(picks, _FEATURES)[0])
    assert torch.equal(kept, ops.select_features(*picked)[0])
    top = partial(scores.topk, _PICKS)
    for op, given, named, in_torch, moved in (
        ("headwise_topk", picked, "topk + sort", lambda: top().indices.sort(), scores.nbytes + picks.nbytes),
        ("union_indices", (picks, _FEATURES), "unique", picks.unique, picks.nbytes + kept.nbytes),
        ("select_features", picked, "topk + unique", lambda: top().indices.unique(), scores.nbytes + kept.nbytes),
    ):
        yield Case(op, "", scores.dtype, given, named, in_torch, moved)


def _scores_in_torch(q: Tensor, k: Tensor) -> Tensor:
    """When every row sees every feature: two batched ops and a mean."""
    keys = k.permute(1, 2, 0).repeat_interleave(_HEADS // _KV_HEADS, dim=0)  # [H, Dh, N]
    weights: Tensor = (torch.bmm(q.transpose(0, 1), keys).float() * _SCALE).softmax(dim=-1)
    return weights.mean(dim=1)


def _writing_cases(dtype: torch.dtype) -> Iterator[Case]:
    rows = _FEATURES // 2
    keys, values = torch.randn(2, _FEATURES, _KV_HEADS, _HEAD_DIM, dtype=dtype)
    kept = torch.randperm(_FEATURES)[:rows].sort().values
    shape = (-(-rows // PAGE_POSITIONS), 1, 2, _KV_HEADS, PAGE_POSITIONS, _HEAD_DIM)
    pages, expected = _on_huge_pages(torch.zeros(shape, dtype=dtype)), torch.zeros(shape, dtype=dtype)
    position = torch.arange(rows)
    slots = torch.randperm(len(pages))[position // PAGE_POSITIONS] * PAGE_POSITIONS + position % PAGE_POSITIONS
    num_bytes = 2 * rows * (keys[0].nbytes + values[0].nbytes)
    for op, detail, *arguments in (
        ("write_kv", f"{rows} rows", keys[:rows], values[:rows], slots),
        ("gather_kv", "half kept", keys, values, kept, slots),
    ):
        in_torch = partial(getattr(reference, op), pages, 0, *arguments)
        case = Case(op, detail, dtype, (pages, 0, *arguments), "advanced indexing", in_torch, num_bytes, "copy")
        getattr(reference, op)(expected.zero_(), 0, *arguments)
        pages.zero_()
        case.run()
        assert torch.equal(pages, expected)
        yield case


def _paged_attention_case(dtype: torch.dtype, batch: int, length: int) -> Case:
    per_sequence = -(-length // PAGE_POSITIONS)
    q = torch.randn(batch, _HEADS, _HEAD_DIM, dtype=dtype)
    pages = _on_huge_pages(torch.randn(batch * per_sequence, 1, 2, _KV_HEADS, PAGE_POSITIONS, _HEAD_DIM, dtype=dtype))
    tables = torch.randperm(len(pages), dtype=torch.int32).view(batch, per_sequence)
    arguments = (q, pages, 0, tables, torch.full((batch,), length, dtype=torch.int32), _SCALE)
    attended = ops.paged_attention(*arguments)
    first = (q[:1], pages, 0, tables[:1], arguments[4][:1], _SCALE)
    torch.testing.assert_close(attended[:1], reference.paged_attention(*first), **PAGED_ATTENTION[dtype])
    # The same keys and values as transformers caches them, [B, Hkv, length, Dh].
    together = pages[tables.long(), 0].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :length, :].contiguous()
    in_torch = partial(_attention_in_torch, q, *together)
    torch.testing.assert_close(in_torch(), attended, rtol=1e-2, atol=1e-2)
    detail = f"length {length}, batch {batch}"
    floor: Floor | None = "read" if length > _TEXT_LENGTH else None  # so few bytes take less time than the call
    return Case("paged_attention", detail, dtype, arguments, "repeat_kv + sdpa", in_torch, together.nbytes, floor)


def _attention_in_torch(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As transformers' sdpa attention does it for models with grouped heads and a mask."""
    group = q.shape[1] // keys.shape[1]
    keys, values = repeat_kv(keys, group), repeat_kv(values, group)
    attended: Tensor = F.scaled_dot_product_attention(q[:, :, None], keys, values)
    return attended[:, :, 0]


def _attention_case(dtype: torch.dtype, shape: tuple[int, int, int, int], *, is_causal: bool) -> Case:
    """The vision encoder of an image of four tiles, or a prompt; a shape is (T, H, Hkv, Dh)."""
    num_rows, num_heads, num_kv_heads, head_dim = shape
    q = torch.randn(num_rows, num_heads, head_dim, dtype=dtype)
    k, v = torch.randn(2, num_rows, num_kv_heads, head_dim, dtype=dtype)
    rows = torch.arange(num_rows, dtype=torch.int32)
    ends = rows + 1 if is_causal else torch.full_like(rows, num_rows)
    visibility = torch.stack([torch.zeros_like(rows), ends], dim=1)
    arguments = (q, k, v, visibility, head_dim**-0.5)
    some = torch.randint(num_rows, (16,))
    expected, _ = reference.attention(q[some], k, v, visibility[some], arguments[4])
    torch.testing.assert_close(ops.attention(*arguments)[0][some], expected, **MANY_ROWS_ATTENTION[dtype])
    queries, keys, values = (part.transpose(0, 1)[None].contiguous() for part in (q, k, v))
    has_groups = num_heads != num_kv_heads
    in_torch = partial(
        F.scaled_dot_product_attention, queries, keys, values, is_causal=is_causal, enable_gqa=has_groups
    )
    detail = f"{num_rows} rows of a {'prompt' if is_causal else 'vision encoder'}"
    return Case("attention", detail, dtype, arguments, "sdpa", in_torch, 2 * q.nbytes + k.nbytes + v.nbytes)


def _linear_case(dtype: torch.dtype, num_rows: int, *, int8: bool) -> Case:
    """int8 beside what model/projection.py does on a GPU."""
    size = _HEADS * _HEAD_DIM
    x, weight = torch.randn(num_rows, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    arguments = (x, *(to_int8(weight) if int8 else (_on_huge_pages(weight),)))
    outputs = ops.linear(*arguments)
    tolerance = (LINEAR_QUANTIZED if int8 else LINEAR)[dtype]
    torch.testing.assert_close(outputs, reference.linear(*arguments), **tolerance)
    named = "weights made floats + linear" if int8 else "linear"
    in_torch = partial(multiply_int8 if int8 else F.linear, *arguments)
    num_bytes = sum(tensor.nbytes for tensor in (*arguments, outputs))
    floor: Floor | None = "read" if num_rows == 1 else None
    detail = f"{num_rows} rows of {size}{', int8 weights' if int8 else ''}"
    return Case("linear", detail, dtype, arguments, named, in_torch, num_bytes, floor)
