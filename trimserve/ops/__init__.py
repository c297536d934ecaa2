"""Compiled ops: feature selection, attention, per-row layers, and a decode step of all layers.

Importing this package loads the compiled ops. It knows nothing about models.
"""

from trimserve.ops.attention import attention
from trimserve.ops.decoding import CrossTables, DecoderLayers, SelfTables, decode_layers
from trimserve.ops.layers import linear, rms_norm, rotate, silu_gate
from trimserve.ops.library import build_info, has_cuda_ops, load_library
from trimserve.ops.paging import PAGE_POSITIONS, gather_kv, paged_attention, rotate_write_kv, write_kv
from trimserve.ops.selection import headwise_scores, headwise_topk, select_features, union_indices

__all__ = [
    "PAGE_POSITIONS",
    "CrossTables",
    "DecoderLayers",
    "SelfTables",
    "attention",
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
    "rotate_write_kv",
    "select_features",
    "silu_gate",
    "union_indices",
    "write_kv",
]
