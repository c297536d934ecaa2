"""Ops on paged keys and values: storing positions, attending to a sequence's positions.

A page pool is one contiguous tensor [P, G, 2, Hkv, PAGE_POSITIONS, Dh] of float32, bfloat16 or float16: P pages; a page
holds PAGE_POSITIONS positions of G layers; 2 stands for keys, values. On a CPU it may be int8 [P, G, 2, Hkv,
PAGE_POSITIONS, Dh + 2] instead: the integers of a head's positions, then the float16 that multiplies each one's
(`reference.int8_parts`), widened in registers only. A sequence's table lists the pages of its positions in order.

Typed wrappers over the compiled ops of `csrc/paging.cpp`, each with its fake kernel (shapes only, for torch.compile).
All checks are made in C++. `reference.py` defines what each op computes.
"""

import torch
from torch import Tensor

from trimserve.ops.library import load_library

__all__ = ["PAGE_POSITIONS", "gather_kv", "paged_attention", "rotate_write_kv", "write_kv"]

PAGE_POSITIONS = 16
"""Positions of one page: few enough to waste less than 16 positions, enough to keep page tables short."""

load_library()


def write_kv(pages: Tensor, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store keys and values of one layer in their pages, in place.

    Row r goes to page slots[r] // PAGE_POSITIONS, offset slots[r] % PAGE_POSITIONS. Rows and heads with gaps
    between them are read in place.

    Args:
        pages: contiguous; written to.
        layer: slot of the layer in its pages, in [0, G).
        keys: dtype of pages, or any of theirs if pages are int8, [R, Hkv, Dh]; R may be 0.
        values: as keys.
        slots: int64 [R], in [0, P * PAGE_POSITIONS), none of them twice.
    Raises:
        ValueError: a wrong dtype or shape, pages that are not contiguous, or a layer or slot out of range.
    Definition: reference.write_kv.
    """
    torch.ops.trimserve.write_kv(pages, layer, keys, values, slots)


def gather_kv(pages: Tensor, layer: int, keys: Tensor, values: Tensor, kept: Tensor, slots: Tensor) -> None:
    """Store the kept rows of one layer's keys and values in their pages, in place: `write_kv` of some rows.

    Row kept[m] goes to page slots[m] // PAGE_POSITIONS, offset slots[m] % PAGE_POSITIONS. Rows and heads with gaps
    between them are read in place.

    Args:
        pages: contiguous; written to.
        layer: slot of the layer in its pages, in [0, G).
        keys: dtype of pages, or any of theirs if pages are int8, [N, Hkv, Dh].
        values: as keys.
        kept: int64 [M], indices in [0, N), any order; M may be 0.
        slots: int64 [M], in [0, P * PAGE_POSITIONS), none of them twice.
    Raises:
        ValueError: a wrong dtype or shape, pages that are not contiguous, or a layer, slot or index out of range (such
            as the -1 that pads a union).
    Definition: reference.gather_kv.
    """
    torch.ops.trimserve.gather_kv(pages, layer, keys, values, kept, slots)


def rotate_write_kv(heads: Tensor, cosines: Tensor, sines: Tensor, pages: Tensor, layer: int, slots: Tensor) -> None:
    """Rotate queries and keys in place, and store keys and values in their pages: `rotate`, then `write_kv`.

    Args:
        heads: dtype of pages, or any of theirs if pages are int8, [R, H + 2 * Hkv, Dh], Dh even, contiguous within a
            row: H queries, Hkv keys, Hkv values; written to.
        cosines: float32 [R, Dh / 2].
        sines: as cosines.
        pages: contiguous; written to.
        layer: slot of the layer in its pages, in [0, G).
        slots: int64 [R], in [0, P * PAGE_POSITIONS), none of them twice.
    Raises:
        ValueError: see `rotate` and `write_kv`.
    Definition: reference.rotate_write_kv.
    """
    torch.ops.trimserve.rotate_write_kv(heads, cosines, sines, pages, layer, slots)


def paged_attention(
    q: Tensor,
    pages: Tensor,
    layer: int,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend with one row of each sequence to all of the sequence's positions.

    Sequence b attends to positions [0, lengths[b]); position p is in page tables[b, p // PAGE_POSITIONS] at offset
    p % PAGE_POSITIONS. Table entries after the last page that a length needs are not read. A sequence's result does
    not depend on the others in the batch or on the number of threads, to the last bit. Strided rows are read in
    place.

    Args:
        q: dtype of pages, or any of theirs if pages are int8, [B, H, Dh], queries; Hkv divides H, query head h reads KV
            head h // (H / Hkv).
        pages: contiguous.
        layer: slot of the layer in its pages, in [0, G).
        tables: int32 [B, max_pages], pages in [0, P).
        lengths: int32 [B], in [0, max_pages * PAGE_POSITIONS].
        scale: factor of the logits, finite.
        bias: float32 [B, max_pages * PAGE_POSITIONS], added to the logits of every head; None if there is no bias.
    Returns:
        [B, H, Dh] of q's dtype, accumulated in float32; zeros where the length is 0.
    Raises:
        ValueError: a wrong dtype or shape, pages that are not contiguous, a layer, length or page out of range, or a
            scale that is not finite.
    Definition: reference.paged_attention.
    """
    result: Tensor = torch.ops.trimserve.paged_attention(q, pages, layer, tables, lengths, scale, bias)
    return result


def _fake_write(*_: object) -> None:  # everything is written in place
    return None


def _fake_paged_attention(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


for _op in ("write_kv", "gather_kv", "rotate_write_kv"):
    torch.library.register_fake(f"trimserve::{_op}", _fake_write)
torch.library.register_fake("trimserve::paged_attention", _fake_paged_attention)
