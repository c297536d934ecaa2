"""What policies that compare features with each other share: likeness within a tile, and quotas of tiles.

Features are compared within their tile only: [tiles, F, F] is a fraction of [N, N], and tiles show different parts of
the image anyway. Policies change that tensor in place, because a copy of it is as large (`trimming.scratch_bytes`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.trimming.policies.policy import top

__all__ = ["directions", "even_quotas", "first_of", "is_broken", "likeness", "next_pick", "quotas_by", "relevance"]


def is_broken(features: Tensor, features_per_tile: int) -> Tensor:
    """Bool [tiles, F], which features of [N, D] are not finite; every policy takes these last."""
    low, high = features.aminmax(dim=1)  # each NaN where any is; takes no copy of the features
    return ~(low.isfinite() & high.isfinite()).view(-1, features_per_tile)


def directions(features: Tensor) -> Tensor:
    """Features [N, D] at length 1, float32; 0 where one is not finite."""
    normal = F.normalize(features.float(), dim=1)
    normal[is_broken(normal, len(normal))[0]] = 0
    return normal


def likeness(features: Tensor, features_per_tile: int, others: Tensor | None = None) -> Tensor:
    """Cosine of every two features of a tile.

    Args:
        features: [N, D], tile after tile.
        features_per_tile: F.
        others: [N, D], what each is compared with; None compares the features with each other.
    Returns:
        float32 [N / F, F, F], the caller's own; 0 where a feature is not finite.
    """
    tiles = features.split(features_per_tile)
    like = torch.empty(len(tiles), features_per_tile, features_per_tile, device=features.device)
    for index, tile in enumerate(tiles):
        own = directions(tile)
        theirs = own if others is None else directions(others.split(features_per_tile)[index])
        torch.mm(own, theirs.T, out=like[index])
    return like


def relevance(scores: Tensor) -> Tensor:
    """Head scores [H, N] as one number per feature in [0, 1]: the mean over heads, least 0, largest 1; NaN is 0."""
    mean = scores.mean(dim=0).nan_to_num(0)
    low, high = mean.aminmax()
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


def even_quotas(count: int, num_tiles: int) -> list[int]:
    """`count` features over tiles as evenly as possible, the first tiles one more.

    >>> even_quotas(7, 3)
    [3, 2, 2]
    """
    return [count // num_tiles + (tile < count % num_tiles) for tile in range(num_tiles)]


def quotas_by(scores: Tensor, count: int, features_per_tile: int) -> list[int]:
    """How many of the `count` best scores [N] each tile has."""
    tiles = top(scores, count) // features_per_tile
    quotas: list[int] = torch.bincount(tiles, minlength=len(scores) // features_per_tile).tolist()
    return quotas


def next_pick(gain: Tensor, is_taken: Tensor, is_late: Tensor) -> Tensor:
    """Take the feature of each tile that gains most; tie: lower index.

    Args:
        gain: float32 [tiles, F].
        is_taken: bool [tiles, F], taken before; gets the pick.
        is_late: bool [tiles, F], taken after all others.
    Returns:
        int64 [tiles, 1].
    """
    lowest = torch.finfo(gain.dtype).min
    pick = gain.masked_fill(is_late, lowest).masked_fill(is_taken, -torch.inf).argmax(dim=1, keepdim=True)
    is_taken.scatter_(1, pick, value=True)
    return pick


def first_of(order: Tensor, quotas: Sequence[int], features_per_tile: int) -> Tensor:
    """The first of each tile's picks, as indices of the image.

    Args:
        order: int64 [tiles, steps], indices in the tile.
        quotas: picks of each tile, at most `steps`.
        features_per_tile: F.
    Returns:
        int64, ascending.
    """
    pieces = [
        tile * features_per_tile + picks[:quota] for tile, (picks, quota) in enumerate(zip(order, quotas, strict=True))
    ]
    return torch.cat(pieces).sort().values
