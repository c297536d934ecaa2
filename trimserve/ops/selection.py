"""Ops that choose which visual features later layers keep: scores, picks, their union.

Typed wrappers over the compiled ops of `csrc/selection.cpp`, each with its fake kernel (shapes only, for
torch.compile). All checks are made in C++. `reference.py` defines what each op computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimserve.ops.library import load_library

__all__ = ["headwise_scores", "headwise_topk", "select_features", "union_indices"]

load_library()


def headwise_scores(q: Tensor, k: Tensor, visibility: Tensor, scale: float, log_sums: Tensor | None = None) -> Tensor:
    """Measure how much the text attends to each visual feature, per query head.

    The score of feature n for head h is the mean, over the text rows that see n, of the row's attention
    weight on n, the softmax taken over every feature that the row sees. A feature that no row sees scores 0.
    A row with a NaN or +inf among its logits gives NaN to every feature that it sees.
    Strided rows are read in place.

    Args:
        q: float32, bfloat16 or float16 [T, H, Dh], queries; T may be 0.
        k: same dtype [N, Hkv, Dh], keys; Hkv divides H, query head h reads key head h // (H / Hkv).
        visibility: int32 [T, 2], row t sees features [visibility[t, 0], visibility[t, 1]), which may be empty.
        scale: factor of the logits, finite.
        log_sums: float32 [H, T] of these very rows, keys and ranges, see `attention`; saves two passes on a CPU, and is
            not read on a GPU. None if they are not known.
    Returns:
        float32 [H, N], each in [0, 1], accumulated in float32.
    Raises:
        ValueError: a wrong dtype or shape, a range outside [0, N], or a scale that is not finite.
    Source: arXiv 2504.00557, method section. Definition: reference.headwise_scores.
    """
    result: Tensor = torch.ops.trimserve.headwise_scores(q, k, visibility, scale, log_sums)
    return result


def headwise_topk(scores: Tensor, segments: Sequence[int], k: Sequence[int]) -> Tensor:
    """Let every head pick the k features of each image that it scores highest.

    The order is: larger score first, tie: lower index, NaN last.

    Args:
        scores: float32 [H, N].
        segments: features of each image, in order; they sum to N.
        k: picks of each image, in [1, features], or 0 for an image without features.
    Returns:
        int64 [H, K], K the sum of k: indices in [0, N), ascending within a row.
    Raises:
        ValueError: a wrong dtype or shape, segments that do not sum to N, or a k out of range.
    Source: arXiv 2504.00557, method section. Definition: reference.headwise_topk.
    """
    result: Tensor = torch.ops.trimserve.headwise_topk(scores, list(segments), list(k))
    return result


def union_indices(picks: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Merge every head's picks into one ascending list.

    Args:
        picks: int64 [H, K], values in [0, num_features), any order.
        num_features: N, visual features before trimming, at least 0.
    Returns:
        kept: int64 [min(H * K, N)], ascending, unused tail -1.
        num_kept: int64 [], real entries of kept.
    Raises:
        ValueError: a wrong dtype or shape, or a pick out of range.
    Source: arXiv 2504.00557, method section. Definition: reference.union_indices.
    """
    result: tuple[Tensor, Tensor] = torch.ops.trimserve.union_indices(picks, num_features)
    return result


def select_features(scores: Tensor, segments: Sequence[int], k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Merge every head's picks into one ascending list, without making them.

    Equal to `union_indices` of `headwise_topk`.

    Args:
        scores: float32 [H, N].
        segments: features of each image, in order; they sum to N.
        k: picks of each image and head, in [1, features], or 0 for an image without features.
    Returns:
        kept: int64 [min(H * K, N)], K the sum of k, ascending, unused tail -1.
        num_kept: int64 [], real entries of kept.
    Raises:
        ValueError: a wrong dtype or shape, segments that do not sum to N, or a k out of range.
    Source: arXiv 2504.00557, method section. Definition: reference.select_features.
    """
    result: tuple[Tensor, Tensor] = torch.ops.trimserve.select_features(scores, list(segments), list(k))
    return result


def _fake_headwise_scores(
    q: Tensor, k: Tensor, visibility: Tensor, scale: float, log_sums: Tensor | None = None
) -> Tensor:
    return q.new_empty((q.shape[1], k.shape[0]), dtype=torch.float32)


def _fake_headwise_topk(scores: Tensor, segments: list[int], k: list[int]) -> Tensor:
    return scores.new_empty((scores.shape[0], sum(k)), dtype=torch.int64)


def _fake_union_indices(picks: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    max_kept = torch.sym_min(picks.numel(), num_features)
    return picks.new_empty((max_kept,)), picks.new_empty(())


def _fake_select_features(scores: Tensor, segments: list[int], k: list[int]) -> tuple[Tensor, Tensor]:
    max_kept = torch.sym_min(scores.shape[0] * sum(k), scores.shape[1])
    return scores.new_empty((max_kept,), dtype=torch.int64), scores.new_empty((), dtype=torch.int64)


torch.library.register_fake("trimserve::headwise_scores", _fake_headwise_scores)
torch.library.register_fake("trimserve::headwise_topk", _fake_headwise_topk)
torch.library.register_fake("trimserve::union_indices", _fake_union_indices)
torch.library.register_fake("trimserve::select_features", _fake_select_features)
