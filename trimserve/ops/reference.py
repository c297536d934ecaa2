"""The specification of every op in plain PyTorch: what the compiled kernels are compared with.

Written to be read, not to be fast. Arguments and results are those of the op of the same name; nothing is
checked.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from trimserve.ops.decoding import CrossTables, DecoderLayers, SelfTables

__all__ = [
    "attention",
    "decode_layers",
    "gather_kv",
    "headwise_scores",
    "headwise_topk",
    "int8_parts",
    "int8_rows",
    "linear",
    "paged_attention",
    "rms_norm",
    "rotate",
    "rotate_write_kv",
    "select_features",
    "silu_gate",
    "union_indices",
    "unpack_int4",
    "widened_pages",
    "write_kv",
]


def headwise_scores(
    q: Tensor,
    k: Tensor,
    visibility: Tensor,
    scale: float,
    log_sums: Tensor | None = None,  # noqa: ARG001 - they follow from the others
) -> Tensor:
    """Define `trimserve.ops.headwise_scores`; computes in float64."""
    num_heads, num_kv_heads, num_features = q.shape[1], k.shape[1], k.shape[0]
    keys = k.double().repeat_interleave(num_heads // num_kv_heads, dim=1)  # [N, H, Dh]
    logits = torch.einsum("thd,nhd->htn", q.double(), keys) * scale
    feature = torch.arange(num_features, device=q.device)
    is_seen = (visibility[:, :1] <= feature) & (feature < visibility[:, 1:])  # [T, N]
    weights = logits.masked_fill(~is_seen, -torch.inf).softmax(dim=-1)
    total = torch.where(is_seen, weights, 0.0).sum(dim=1)  # [H, N]
    return (total / is_seen.sum(dim=0).clamp(min=1)).float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Define `trimserve.ops.attention`; computes in float64."""
    keys, values = (part.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))  # [N, H, Dh]
    logits = torch.einsum("thd,nhd->htn", q.double(), keys) * scale
    position = torch.arange(k.shape[0], device=q.device)
    is_seen = (visibility[:, :1] <= position) & (position < visibility[:, 1:])  # [T, N]
    logits = (logits if bias is None else logits + bias.double()).masked_fill(~is_seen, -torch.inf)
    log_sums = logits.logsumexp(dim=-1)
    weights = torch.where(is_seen, (logits - log_sums[..., None]).exp(), 0.0)
    return torch.einsum("htn,nhd->thd", weights, values).to(q.dtype), log_sums.float()


def headwise_topk(scores: Tensor, segments: Sequence[int], k: Sequence[int]) -> Tensor:
    """Define `trimserve.ops.headwise_topk`."""
    picks, begin = [], 0
    for size, num_picks in zip(segments, k, strict=True):
        # Ascending order of the negated scores is larger first, NaN last; stable is tie to lower index.
        order = (-scores[:, begin : begin + size]).sort(dim=1, stable=True).indices
        picks.append(order[:, :num_picks].sort(dim=1).values + begin)
        begin += size
    return torch.cat(picks, dim=1) if picks else scores.new_empty((scores.shape[0], 0), dtype=torch.int64)


def union_indices(picks: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Define `trimserve.ops.union_indices`."""
    merged = picks.unique()
    kept = merged.new_full((min(picks.numel(), num_features),), -1)
    kept[: merged.numel()] = merged
    return kept, torch.tensor(merged.numel(), device=picks.device)


def select_features(scores: Tensor, segments: Sequence[int], k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Define `trimserve.ops.select_features`."""
    return union_indices(headwise_topk(scores, segments, k), scores.shape[1])


def write_kv(pages: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Define `trimserve.ops.write_kv`."""
    page_positions = pages.shape[4]
    page, offset = slots // page_positions, slots % page_positions
    for half, rows in enumerate((keys, values)):
        parts = zip(int8_parts(pages), int8_rows(rows), strict=True) if pages.dtype == torch.int8 else [(pages, rows)]
        for stored, part in parts:
            stored[:, layer, half].transpose(1, 2)[page, offset] = part  # [P, 16, Hkv, ...] at [R], [R]


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Define what int8 pages hold of a row of keys or values: Dh integers and the float16 that multiplies them.

    The scale is the float16 next to the largest magnitude / 127; an integer is the element / scale, rounded to the
    nearest, ties to even, and clamped to [-127, 127]. A row without a finite scale has scale NaN.

    Args:
        rows: float32, bfloat16 or float16 [..., Dh].
    Returns:
        int8 [..., Dh] and float16 [...].
    """
    floats = rows.float()
    scales = (floats.abs().amax(dim=-1) / 127).half()
    scales = scales.masked_fill(~scales.isfinite(), torch.nan)
    divisors = scales.float().masked_fill(scales == 0, torch.inf)[..., None]
    integers = (floats / divisors).round().clamp(-127, 127).nan_to_num()  # all 0 where the scale is 0 or NaN
    return integers.to(torch.int8), scales


def int8_parts(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Define where int8 pages have them: the integers of a head's 16 positions, then the 16 scales.

    Args:
        pages: int8 [P, G, 2, Hkv, 16, Dh + 2], contiguous.
    Returns:
        Views of it, int8 [P, G, 2, Hkv, 16, Dh] and float16 [P, G, 2, Hkv, 16].
    """
    page_positions, row = pages.shape[-2:]
    integers, scales = pages.flatten(-2).split([page_positions * (row - 2), page_positions * 2], dim=-1)
    return integers.unflatten(-1, (page_positions, row - 2)), scales.view(torch.float16)


def widened_pages(pages: Tensor) -> Tensor:
    """What int8 pages stand for, float32 [P, G, 2, Hkv, 16, Dh]."""
    integers, scales = int8_parts(pages)
    return integers.float() * scales.float()[..., None]


def gather_kv(pages: Tensor, layer: int, keys: Tensor, values: Tensor, kept: Tensor, slots: Tensor) -> None:
    """Define `trimserve.ops.gather_kv`."""
    write_kv(pages, layer, keys[kept], values[kept], slots)


def paged_attention(
    q: Tensor,
    pages: Tensor,
    layer: int,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Define `trimserve.ops.paged_attention`; computes in float64."""
    group = q.shape[1] // pages.shape[3]
    attended = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        if length:
            used = tables[b, : -(-length // pages.shape[4])].long()
            of_sequence = pages[used, layer : layer + 1]
            rows = widened_pages(of_sequence) if pages.dtype == torch.int8 else of_sequence
            keys, values = rows[:, 0].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
            keys, values = (part.repeat_interleave(group, dim=0) for part in (keys, values))  # [H, length, Dh]
            logits = torch.einsum("hd,hpd->hp", q[b].double(), keys) * scale
            weights = (logits if bias is None else logits + bias[b, :length]).softmax(dim=-1)
            attended[b] = torch.einsum("hp,hpd->hd", weights, values).to(q.dtype)
    return attended


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """Define `trimserve.ops.linear`; computes in float64."""
    return _product(x, weight, scales).to(x.dtype)


def _product(x: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    if scales is not None and weight.dtype == torch.uint8:
        weight, scales = unpack_int4(weight, scales, x.shape[1]), None
    product = x.double() @ weight.double().T
    return product if scales is None else product * scales.double()


def unpack_int4(weight: Tensor, scales: Tensor, num_inputs: int) -> Tensor:
    """Define how int4 weights lie in memory.

    A row of 16 bytes for each 32 inputs: byte i has input i in its low half and input i + 16 in its high half, each
    plus 8. Halves past the last input mean nothing. A weight is that integer in [-8, 7] times the scale of its group:
    the row's inputs are cut into groups of 32, 64 or 128, of which the last may be shorter. How many groups there are
    tells their size.

    Args:
        weight: uint8 [N, 16 * ceil(K / 32)].
        scales: float32, bfloat16 or float16 [N, ceil(K / group)].
        num_inputs: K.
    Returns:
        float64 [N, K].
    """
    units = weight.unflatten(1, (-1, 16))
    integers = torch.cat([units & 15, units >> 4], dim=2).flatten(1)[:, :num_inputs].double() - 8
    num_groups = scales.shape[1]
    group = next(size for size in (32, 64, 128) if -(-num_inputs // size) == num_groups)
    return integers * scales.double().repeat_interleave(group, dim=1)[:, :num_inputs]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Define `trimserve.ops.rms_norm`; computes in float64."""
    rows = x.double()
    return (rows / (rows.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight.double()).to(x.dtype)


def silu_gate(gate_up: Tensor, counts: Tensor | None = None) -> Tensor:
    """Define `trimserve.ops.silu_gate`; computes in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    passed = (gate * gate.sigmoid() * up).to(gate_up.dtype)
    return passed if counts is None else passed.masked_fill((counts == 0)[:, None], 0.0)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Define `trimserve.ops.rotate`; computes in float64."""
    left, right = heads.double().chunk(2, dim=-1)
    cos, sin = cosines.double()[:, None], sines.double()[:, None]
    heads.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))


def rotate_write_kv(heads: Tensor, cosines: Tensor, sines: Tensor, pages: Tensor, layer: int, slots: Tensor) -> None:
    """Define `trimserve.ops.rotate_write_kv`."""
    num_kv_heads = pages.shape[3]
    queries, keys, values = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    rotate(queries, cosines, sines)
    rotate(keys, cosines, sines)
    write_kv(pages, layer, keys, values, slots)


def decode_layers(
    layers: DecoderLayers,
    hidden: Tensor,
    pages: Tensor,
    angles: tuple[Tensor, Tensor],
    text: SelfTables,
    features: CrossTables | None = None,
) -> None:
    """Define `trimserve.ops.decode_layers`."""
    weights, scales, gates = iter(layers.weights), iter(layers.scales), iter(layers.gates)
    layers_per_page, num_kv_heads = pages.shape[1], pages.shape[3]
    head_dim = pages.shape[5] - (2 if pages.dtype == torch.int8 else 0)
    num_layers = (len(layers.weights) - len(layers.cross_layers)) // 6
    seen = CrossTables((), ()) if features is None else features
    num_self = num_cross = 0
    for layer in range(num_layers):
        is_cross = layer in layers.cross_layers
        norm, projection, *query_norm, output, mlp_norm, gate_up, down = islice(weights, 7 if is_cross else 6)
        of_linears = [part if part.numel() else None for part in islice(scales, 4)] or [None] * 4
        attention_gate, mlp_gate = islice(gates, 2) if is_cross else (1.0, 1.0)
        if is_cross and not seen.lengths:
            continue
        rows = hidden[: len(seen.lengths[num_cross])] if is_cross else hidden
        heads = linear(rms_norm(rows, norm, layers.epsilon), projection, of_linears[0]).unflatten(1, (-1, head_dim))
        if is_cross:
            q = rms_norm(heads, query_norm[0], layers.epsilon)
            tables, lengths = seen.tables[num_cross], seen.lengths[num_cross]
            bias = seen.biases[num_cross] if seen.biases else None
            attended = paged_attention(q, pages, num_cross % layers_per_page, tables, lengths, head_dim**-0.5, bias)
            num_cross += 1
        else:
            group, slot = divmod(num_self, layers_per_page)
            q = heads[:, : -2 * num_kv_heads]
            rotate_write_kv(heads, *angles, pages, slot, text.slots[group])
            attended = paged_attention(q, pages, slot, text.tables[group], text.lengths, head_dim**-0.5)
            num_self += 1
        _add_product(rows, attended.flatten(1), output, of_linears[1], attention_gate)
        activated = silu_gate(linear(rms_norm(rows, mlp_norm, layers.epsilon), gate_up, of_linears[2]))
        _add_product(rows, activated, down, of_linears[3], mlp_gate)


def _add_product(rows: Tensor, x: Tensor, weight: Tensor, scales: Tensor | None, gate: float) -> None:
    """Add gate * linear(x, weight, scales) to `rows` in place; rounds once."""
    rows.copy_(rows.double() + gate * _product(x, weight, scales))
