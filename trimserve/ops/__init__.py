"""The compiled operations of trimming and of paged attention, and what is known about their build.

Importing this package loads the compiled ops. It knows nothing about models.
"""

from trimserve.ops.library import build_info, load_library
from trimserve.ops.paging import PAGE_POSITIONS, paged_attention, write_kv
from trimserve.ops.selection import gather_kv, headwise_scores, headwise_topk, select_features, union_indices

__all__ = [
    "PAGE_POSITIONS",
    "build_info",
    "gather_kv",
    "headwise_scores",
    "headwise_topk",
    "load_library",
    "paged_attention",
    "select_features",
    "union_indices",
    "write_kv",
]
