"""What a policy sees after a cross-attention layer: queries, keys and features of one request's images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from trimserve import ops
from trimserve.trimming.trained import Trained

__all__ = ["CrossAttentionView", "SeenImage"]

_SCORED_ROWS: Final = 1024
"""Between two pauses."""


@dataclass(eq=False)
class CrossAttentionView:
    """What one cross-attention layer computed from one request's images, kept features only."""

    queries: Tensor
    """[S, H, Dh], of the rows that see an image."""
    keys: Tensor
    """[N, Hkv, Dh]"""
    features: Tensor
    """[N, D]"""
    visibility: Tensor
    """int32 [S, 2], the range of features that each row sees."""
    scale: float
    """Factor of the logits."""
    num_features: Sequence[int]
    """Features of each image; they sum to N."""
    features_per_tile: int
    """Tiles follow each other."""
    wants_picks: bool = True
    """Whether a choice should say what each head picked, if the policy asks heads."""
    layer: int = 0
    """Which cross-attention layer, counted from 0."""
    hidden: Tensor | None = None
    """[S, D], what those rows were before the layer; None when a guide looks."""
    added: Tensor | None = None
    """[S, D], what the layer's gated attention added to them; None when a guide looks."""
    log_sums: Tensor | None = None
    """float32 [H, S], see `ops.attention`; None if they are not known."""
    trained: Mapping[str, Trained] = field(default_factory=dict)
    """What the model's policies have learned, by their names."""

    @cached_property
    def scores(self) -> Tensor:
        """float32 [H, N], see `ops.headwise_scores`."""
        return ops.headwise_scores(self.queries, self.keys, self.visibility, self.scale, self.log_sums)

    def read_scores(self) -> Iterator[None]:
        """Make the scores of many rows piece by piece; yields after each piece."""
        num_rows = len(self.queries)
        if num_rows <= _SCORED_ROWS or self.queries.device.type != "cpu":
            return
        counts = self._num_seeing(slice(None))
        self.scores = self.queries.new_zeros((self.queries.shape[1], len(self.keys)), dtype=torch.float32)
        for first in range(0, num_rows, _SCORED_ROWS):
            rows = slice(first, first + _SCORED_ROWS)
            log_sums = None if self.log_sums is None else self.log_sums[:, rows].contiguous()
            scores = ops.headwise_scores(self.queries[rows], self.keys, self.visibility[rows], self.scale, log_sums)
            self.scores.addcmul_(scores, self._num_seeing(rows) / counts.clamp(min=1))
            yield

    def _num_seeing(self, rows: slice) -> Tensor:
        """How many of some rows see each feature, float32 [N]."""
        first, end = self.visibility[rows].long().unbind(dim=1)
        changes = torch.zeros(len(self.keys) + 1, device=first.device)
        ones = torch.ones_like(first, dtype=torch.float32)
        changes.index_add_(0, first, ones).index_add_(0, end, -ones)
        return changes.cumsum(dim=0)[:-1]

    def scores_of(self, rows: Tensor) -> Tensor:
        """The same, averaged over the given rows only, int64 [R]."""
        visibility = self.visibility[rows.to(self.visibility.device)]
        log_sums = None if self.log_sums is None else self.log_sums[:, rows]
        return ops.headwise_scores(self.queries[rows], self.keys, visibility, self.scale, log_sums)

    def images(self) -> list["SeenImage"]:
        """The images one by one, in order."""
        ends = list(accumulate(self.num_features))
        return [SeenImage(self, index, ends[index] - n, n) for index, n in enumerate(self.num_features)]


@dataclass(frozen=True, slots=True)
class SeenImage:
    """One image of a `CrossAttentionView`."""

    view: CrossAttentionView
    index: int
    """Position among the request's images."""
    start: int
    """Where its features begin."""
    num_features: int
    """n, at least 1."""

    @property
    def features_per_tile(self) -> int:
        """Features of one tile, its class token first."""
        return self.view.features_per_tile

    @property
    def scores(self) -> Tensor:
        """float32 [H, n], attention of each query head, averaged over the rows that see the image."""
        return self.view.scores[:, self._own]

    @property
    def features(self) -> Tensor:
        """[n, D]."""
        return self.view.features[self._own]

    @property
    def keys(self) -> Tensor:
        """[n, Hkv, Dh]."""
        return self.view.keys[self._own]

    @property
    def rows(self) -> Tensor:
        """int64 [R], ascending, the rows that see the image."""
        first, end = self.view.visibility.unbind(dim=1)
        return ((first <= self.start) & (self.start < end)).nonzero()[:, 0].to(self.view.queries.device)

    def scores_of(self, rows: Tensor) -> Tensor:
        """float32 [H, n], averaged over the given rows, int64 [R], which all see the image."""
        return self.view.scores_of(rows)[:, self._own]

    @property
    def _own(self) -> slice:
        return slice(self.start, self.start + self.num_features)
