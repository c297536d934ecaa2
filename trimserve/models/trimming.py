"""Which visual features later layers keep: the budget, the policy `trimmed`, its controls, and what they answered.

Source: Trimmed Llama, arXiv 2504.00557. In the first cross-attention layer every query head picks the k features of
an image that the text attends to most; the union of the picks over the heads is kept. What the paper leaves open
(rows are averaged, k counts valid features of each image apart, heads are query heads) is decided in
`docs/architecture.md`. This file knows no model: scores come in, indices go out.

`random` and `strided` are controls for evaluation: of each image they keep as many features as `trimmed` would for
the same request, but without looking. What they answer worse is what the choice of features is worth.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimserve import ops

__all__ = ["POLICIES", "ImageSelection", "Selection", "TrimParams", "bitmap", "budget", "max_rows", "select"]

POLICIES = ("trimmed", "random", "strided")
"""Names that `TrimParams.policy` takes; the first is the default."""

_ROUNDING = 1e-9  # 0.55 * 100 is 55.00000000000001 in double precision and must give 55 picks


@dataclass(frozen=True, slots=True)
class TrimParams:
    """How one request wants its visual features trimmed."""

    enabled: bool = True
    policy: str = "trimmed"
    k_ratio: float = 1.0
    """Budget per head in (0, 1]: each head picks ceil(k_ratio * N) of an image's N valid features."""
    max_kept_fraction: float | None = None
    """Cap of the union, in (0, 1], per image; None: no cap."""
    merge_ratio: float = 0.0
    """Rows in [0, 1] that the features of a tile that are not kept are merged into, as a share of its features
    (`merging.py`); 0: they are dropped."""
    return_selection: bool = False

    @property
    def can_drop(self) -> bool:
        """Whether any feature could go; if not, the request takes the untrimmed path, bit for bit."""
        return self.enabled and (self.k_ratio < 1 or (self.max_kept_fraction or 1) < 1)


@dataclass(frozen=True, slots=True)
class ImageSelection:
    """What was kept of one image, for people and tools that want to see it.

    Feature n of an image: tile n // features_per_tile (row-major on the tile grid), and within the tile 0 is the
    class token and 1 + row * patches_per_side + column a patch. A bitmap has bit n % 8 (least significant first)
    of byte n // 8 set where feature n is in.
    """

    tiles_high: int
    tiles_wide: int
    features_per_tile: int
    content_height: int
    """Pixels of the tile canvas that the resized image covers, from the top; the rest is padding."""
    content_width: int
    """The same from the left."""
    kept: bytes
    """Bitmap of the kept features."""
    picks_by_head: tuple[bytes, ...]
    """Bitmap of each query head's picks in the first cross-attention layer; empty when trimming is off and for the
    policies that ask no head."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Kept features of one request's images."""

    kept: Tensor
    """int64 [M], ascending over the features of all images in order."""
    num_kept: tuple[int, ...]
    """Kept features of each image; sums to M."""
    picks: Tensor
    """int64 [H, K], what each query head picked; [0, 0] where no head was asked."""


def budget(k_ratio: float, num_features: int) -> int:
    """Picks per head for one image.

    Args:
        k_ratio: in (0, 1].
        num_features: valid features of the image, at least 1.
    Returns:
        k = ceil(k_ratio * num_features - 1e-9), clamped to [1, num_features].

    >>> budget(0.2, 65)
    13
    """
    return min(max(math.ceil(k_ratio * num_features - _ROUNDING), 1), num_features)


def max_rows(num_features: int, num_heads: int, features_per_tile: int, trim: TrimParams) -> int:
    """Most rows that an image can hold after selection; at most `num_features`.

    Args:
        num_features: valid features of the image, at least 1.
        num_heads: H.
        features_per_tile: of the model.
        trim: of the request.
    """
    if not trim.can_drop:
        return num_features
    kept = num_heads * budget(trim.k_ratio, num_features)
    if trim.max_kept_fraction is not None:
        kept = min(kept, _cap(num_features, trim.max_kept_fraction))
    if trim.merge_ratio:
        kept += num_features // features_per_tile * budget(trim.merge_ratio, features_per_tile)
    return min(kept, num_features)


def select(scores: Tensor, num_features: Sequence[int], trim: TrimParams) -> Selection:
    """Choose the features of each image that later layers keep.

    Args:
        scores: float32 [H, N], attention of each query head on each feature (`ops.headwise_scores`).
        num_features: valid features of each image, each at least 1, sum N.
        trim: `policy`, `k_ratio` and `max_kept_fraction`.
    Returns:
        `trimmed`: the union of the heads' picks; at most `max(1, floor(max_kept_fraction * n))` features of an
        image with n where that cap is given: more votes first, then the higher best score, then the lower index.
        `random`: as many features of each image, drawn from all subsets of that size alike. Image index, n and
        count are the seed, so a request's draw is the same on every run, on every machine and in every batch.
        `strided`: as many features of each image, evenly spaced: feature floor((j + 1/2) * n / count) for each j.
    Source: arXiv 2504.00557, method section; the cap and the controls are ours.
    """
    selection = _trimmed(scores, num_features, trim)
    if trim.policy == "trimmed":
        return selection
    choose = {"random": _random, "strided": _strided}[trim.policy]
    pieces = []
    start = 0
    for image, (n, count) in enumerate(zip(num_features, selection.num_kept, strict=True)):
        pieces.append(start + choose(image, n, count))
        start += n
    kept = torch.cat(pieces).to(scores.device)
    return Selection(kept, selection.num_kept, selection.picks.new_empty((0, 0)))


def bitmap(indices: Tensor, num_features: int) -> bytes:
    """Pack indices in [0, num_features) into bits, least significant first.

    >>> bitmap(torch.tensor([0, 9]), 10).hex()
    '0102'
    """
    bits = np.zeros(num_features, dtype=bool)
    bits[indices.cpu().numpy()] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _trimmed(scores: Tensor, num_features: Sequence[int], trim: TrimParams) -> Selection:
    ks = [budget(trim.k_ratio, n) for n in num_features]
    picks = ops.headwise_topk(scores, list(num_features), ks)
    padded, num_kept = ops.union_indices(picks, scores.shape[1])
    kept = padded[: int(num_kept)]
    if trim.max_kept_fraction is not None:
        kept = _capped(kept, picks, scores, num_features, trim.max_kept_fraction)
    ends = torch.tensor(num_features).cumsum(0)
    counts = torch.searchsorted(kept.cpu(), ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
    return Selection(kept, tuple(counts.tolist()), picks)


def _capped(kept: Tensor, picks: Tensor, scores: Tensor, num_features: Sequence[int], fraction: float) -> Tensor:
    votes = torch.bincount(picks.flatten(), minlength=scores.shape[1])
    best = scores.amax(dim=0)
    pieces = []
    start = 0
    for n in num_features:
        image = kept[(kept >= start) & (kept < start + n)]
        # Stable sorts from the least to the most important key; `image` is ascending, which settles the last tie.
        image = image[best[image].argsort(descending=True, stable=True)]
        image = image[votes[image].argsort(descending=True, stable=True)]
        pieces.append(image[: _cap(n, fraction)].sort().values)
        start += n
    return torch.cat(pieces)


def _cap(num_features: int, fraction: float) -> int:
    return max(1, math.floor(fraction * num_features + _ROUNDING))


def _random(image: int, num_features: int, count: int) -> Tensor:
    # Python's generator and not torch's: its stream for a seed is the same in every version.
    rng = random.Random(f"{image}/{num_features}/{count}")
    return torch.tensor(sorted(rng.sample(range(num_features), count)), dtype=torch.int64)


def _strided(_image: int, num_features: int, count: int) -> Tensor:
    return (2 * torch.arange(count) + 1) * num_features // (2 * count)
