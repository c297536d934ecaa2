"""First cross-attention layers with known scores, for tables worked by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimserve.trimming.policies.policy import CrossAttentionView

__all__ = ["attended", "scored"]


def scored(scores: Tensor, num_features: Sequence[int], features: Tensor | None = None) -> CrossAttentionView:
    """A layer whose heads have these scores, [H, N]; one tile an image unless N of all images divides evenly.

    Args:
        scores: float32 [H, N].
        num_features: of each image.
        features: [N, D]; None: they do not matter.
    """
    num_all = scores.shape[1]
    if features is None:
        features = torch.zeros(num_all, 1)
    ends = torch.tensor([[0, num_all]], dtype=torch.int32)
    no_query, no_keys = torch.zeros(1, len(scores), 1), torch.zeros(num_all, 1, 1)
    layer = CrossAttentionView(no_query, no_keys, features, ends, 1.0, num_features, min(num_features))
    layer.scores = scores
    return layer


def attended(weights: Tensor, features: Tensor | None = None) -> CrossAttentionView:
    """A layer with one image whose text rows have these attention weights.

    Args:
        weights: float32 [T, H, N], above 0; every row of a head sums to 1.
        features: [N, D]; None: they do not matter.
    """
    num_rows, num_heads, num_features = weights.shape
    if features is None:
        features = torch.zeros(num_features, 1)
    # Row t of every head asks for component t of the keys, which is the logarithm of its weights.
    queries = torch.eye(num_rows)[:, None].expand(-1, num_heads, -1).contiguous()
    keys = weights.log().permute(2, 1, 0).contiguous()
    visibility = torch.tensor([[0, num_features]] * num_rows, dtype=torch.int32)
    return CrossAttentionView(queries, keys, features, visibility, 1.0, (num_features,), num_features)
