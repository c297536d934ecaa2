"""The policy `sparsevlm`: what the text rows attend to most that concern the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance, budget
from trimserve.trimming.policies.density_peaks import group_members
from trimserve.trimming.policies.policy import (
    AfterFirstLayer,
    Choice,
    CrossAttentionView,
    SeenImage,
    Verdict,
    parameter,
    top,
)

__all__ = ["SparseVLM"]

_MEANS_SHARE = 0.1  # for each feature that is recycled
_ROUNDING = 1e-6  # rows that are equally relevant are all raters, whatever the rounding of their mean


@dataclass(frozen=True, slots=True)
class SparseVLM(AfterFirstLayer):
    """Features are ranked by the attention of the *rater* rows, averaged over raters and query heads.

        relevance[t] = mean_h mean_n softmax_t(q[h, t] . k[h, n] * scale)
        raters       = rows t with relevance[t] >= mean_t relevance
        score[n]     = mean_h mean_{t in raters} softmax_n(q[h, t] . k[h, n] * scale)

    With `recycle_ratio` above 0 the budget of C rows is made of features and of M = round(recycle_ratio * (N - C) / 10)
    means, at least one of them a feature. The C - M best stay as they are. Of the others, the best `recycle_ratio` are
    grouped around density peaks within their tile, and each group becomes its mean. The rest is dropped, whatever
    `merge_ratio` says.

    With `cascade_ratio` below 1 every later cross-attention layer attends to the M features that it is given, ranks
    them in the same way by its own queries and keys, and passes the best ceil(cascade_ratio * M) on.

    Source: SparseVLM, arXiv 2410.04417, section 3. Adapted: the paper compares text and image embeddings, which in
    Mllama lie in different spaces; queries and keys of the first cross-attention layer are made to be compared. Its
    schedule names a count for each of three layers; here it is one ratio, and raters are found in each layer anew. It
    recycles 0.3, once for each layer, and the means come on top; here they are made once, of features whose keys in the
    first layer are near each other, and weigh as much as their members did.
    """

    name: ClassVar[str] = "sparsevlm"

    recycle_ratio: float = parameter(
        0.0, 0, 1, "Share of the dropped features that become means, about one for ten features; the paper takes 0.3."
    )
    cascade_ratio: float = parameter(
        1.0, 0, 1, "Share of an image's kept features that each later cross-attention layer keeps.", is_low_open=True
    )

    @property
    def trims_later_layers(self) -> bool:
        """See `Policy.trims_later_layers`."""
        return self.cascade_ratio < 1

    def is_asked_after(self, layer: int) -> bool:
        """See `Policy.is_asked_after`."""
        return layer == 0 or self.trims_later_layers

    def after_layer(self, view: CrossAttentionView, allowance: Allowance) -> list[Choice] | Verdict:
        """See `Policy.after_layer`."""
        if view.layer == 0:
            return AfterFirstLayer.after_layer(self, view, allowance)
        return [self._choose_again(image) for image in view.images()]

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`; the means are part of the budget."""
        scores = image.scores_of(_raters(image)).mean(dim=0)
        count, n = allowance.count(scores), image.num_features
        num_means = min(round(_MEANS_SHARE * self.recycle_ratio * (n - count)), count - 1)
        num_kept = count - num_means
        kept = top(scores, num_kept)
        if not self.recycle_ratio:
            return Choice(kept)
        is_recycled = torch.zeros(n, dtype=torch.bool, device=scores.device)
        is_recycled[top(scores, num_kept + round(self.recycle_ratio * (n - num_kept)))] = True
        is_recycled[kept] = False
        return Choice(kept, groups=group_members(image.keys, is_recycled, image.features_per_tile, num_means))

    def _choose_again(self, image: SeenImage) -> Choice:
        scores = image.scores_of(_raters(image)).mean(dim=0)
        return Choice(top(scores, budget(self.cascade_ratio, image.num_features)))


def _raters(image: SeenImage) -> Tensor:
    """int64 [R], the rows that see the image and have at least average relevance for it; all if none has any."""
    rows = image.rows
    queries, keys = image.view.queries[rows].float(), image.keys.float()
    heads_per_key = queries.shape[1] // keys.shape[1]
    relevance = torch.zeros(len(rows), device=rows.device)
    for head in range(queries.shape[1]):  # one after the other: [H, T, N] is never in memory
        logits = queries[:, head] @ keys[:, head // heads_per_key].T * image.view.scale
        relevance += logits.softmax(dim=0).mean(dim=1)
    is_rater = relevance >= (1 - _ROUNDING) * relevance.mean()
    return rows[is_rater] if is_rater.any() else rows
