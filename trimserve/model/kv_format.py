"""How keys and values lie in pages: as the model computes them, or as int8 with a float16 scale to each head of a row.

`ops.write_kv` stores them and `ops.paged_attention` reads them; a prompt's rows attend to the same values that decoded
rows will read, so that a token's result does not depend on the pass that computes it.
"""

import torch
from torch import Tensor

__all__ = ["page_dtype", "page_row", "round_as_stored", "row_bytes"]

_SCALE_BYTES = torch.float16.itemsize
_ROWS_AT_ONCE = 512
"""Whose float32 copies stay in cache, and are nothing beside a request's features."""


def page_dtype(kv_dtype: str) -> torch.dtype:
    """The dtype of pages, by `ModelInfo.kv_dtype`."""
    dtype: torch.dtype = getattr(torch, kv_dtype)
    return dtype


def page_row(kv_dtype: str, head_dim: int) -> int:
    """Elements of one head of one position in a page.

    >>> page_row("int8", 128), page_row("bfloat16", 128)
    (130, 128)
    """
    return head_dim + (_SCALE_BYTES if kv_dtype == "int8" else 0)


def row_bytes(kv_dtype: str, head_dim: int) -> int:
    """Bytes of such a row.

    >>> row_bytes("int8", 128), row_bytes("bfloat16", 128)
    (130, 256)
    """
    return page_row(kv_dtype, head_dim) * page_dtype(kv_dtype).itemsize


def round_as_stored(rows: Tensor, pages: Tensor) -> None:
    """Make keys or values, in place, what will be read of them from pages.

    Args:
        rows: [R, Hkv, Dh]; NaN where a head gets no finite scale.
        pages: where they are stored; of int8, or of the rows' dtype, which changes nothing.
    """
    if pages.dtype != torch.int8:
        return
    for piece in rows.split(_ROWS_AT_ONCE):
        floats = piece.float()
        scales = (floats.abs().amax(dim=-1, keepdim=True) / 127).half().float()
        scales = scales.masked_fill(~scales.isfinite(), torch.nan)
        integers = floats / scales.masked_fill(scales == 0, torch.inf)
        piece.copy_(integers.round_().clamp_(-127, 127).mul_(scales))
