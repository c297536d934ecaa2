"""The compiled operations of trimming, of paged attention of rows between attentions, and their build.

Importing this package loads the compiled ops. It knows nothing about models.
"""

from trimserve.ops.layers import decode_layers, linear, rms_norm, rotate, silu_gate
from trimserve.ops.library import build_info, has_cuda_ops, load_library
from trimserve.ops.paging import PAGE_POSITIONS, gather_kv, paged_attention, write_kv
from trimserve.ops.selection import headwise_scores, headwise_topk, select_features, union_indices

__all__ = [
    "PAGE_POSITIONS",
    "build_info",
    "decode_layers",
    "gather_kv",
    "has_cuda_ops",
    "headwise_scores",
    "headwise_topk",
    "linear",
    "load_library",
    "paged_attention",
    "rms_norm",
    "rotate",
    "select_features",
    "silu_gate",
    "union_indices",
    "write_kv",
]
