"""The memory of pages."""

import torch
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.model import huge_pages
from trimserve.model.kv_format import page_dtype, page_row
from trimserve.ops import PAGE_POSITIONS

__all__ = ["page_memory"]


def page_memory(info: ModelInfo, num_pages: int, layers_per_page: int) -> Tensor:
    """Memory of a rank's pages, [num_pages + 1, layers_per_page, 2, KV heads of a rank, 16, row].

    On a CPU memory is taken once it is written. The last page is no sequence's: rows that pad a batch write there.

    Args:
        info: geometry, dtype of keys and values, and device.
        num_pages: that sequences can own.
        layers_per_page: layers whose keys and values share a page.
    Raises:
        MemoryError, RuntimeError, torch.OutOfMemoryError: there is not as much memory.
    """
    num_kv_heads = info.num_kv_heads // info.tensor_parallel
    shape = (num_pages + 1, layers_per_page, 2, num_kv_heads, PAGE_POSITIONS, page_row(info.kv_dtype, info.head_dim))
    return huge_pages.empty(shape, page_dtype(info.kv_dtype), torch.device(info.device))
