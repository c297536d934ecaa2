"""The policy `todre`: features whose distances from each other add up to the most."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage
from trimserve.trimming.policies.policy import BeforeDecoder, CrossAttentionView, Verdict, parameter
from trimserve.trimming.policies.tiles import even_quotas, first_of, is_broken, likeness, next_pick

__all__ = ["ToDRE"]


@dataclass(frozen=True, slots=True)
class ToDRE(BeforeDecoder):
    """Features are taken one by one; the next has the largest sum of distances to those that are kept.

        next = argmax_n  sum_{m kept} 1 - cos(f[n], f[m]);   the first has the largest sum to all features

    With `late_exit_threshold` above 0, cross-attention layers are left out once the text takes little from the image.
    With h[t] a row before a layer and a[t] what the layer's gated attention adds to it, the layer is the last one if

        mean_t  |a[t]| / (|a[t]| + |h[t]|)  <  late_exit_threshold

    over the prompt rows that see an image. No row of the request, decoded ones included, sees an image in later layers.

    Source: ToDRE, arXiv 2505.18757, stage 1 in its second version (max-sum diversification), and stage 2. Adapted:
    features are compared within their tile, and every tile keeps the same number; a remainder goes to the first tiles.
    Stage 2 of the paper measures how much of a row's attention goes to the image. Cross-attention goes nowhere else, so
    the share of its update in the row stands in. It ranks by no score, so only a ratio or a count can be its budget.
    """

    name: ClassVar[str] = "todre"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "count")

    late_exit_threshold: float = parameter(
        0.0, 0, 1, "Later cross-attention layers are left out once the image's share in the text rows is below this."
    )

    @property
    def trims_later_layers(self) -> bool:
        """See `Policy.trims_later_layers`."""
        return self.late_exit_threshold > 0

    def is_asked_after(self, layer: int) -> bool:  # noqa: ARG002 - after any, or none
        """See `Policy.is_asked_after`."""
        return self.trims_later_layers

    def after_layer(self, view: CrossAttentionView, allowance: Allowance) -> list[Choice] | Verdict:  # noqa: ARG002 - it leaves or keeps all
        """See `Policy.after_layer`."""
        assert view.hidden is not None
        assert view.added is not None
        taken, own = (torch.linalg.vector_norm(each, dim=1, dtype=torch.float32) for each in (view.added, view.hidden))
        has_seen_enough = bool((taken / (taken + own)).mean() < self.late_exit_threshold)
        return Verdict.LEAVE if has_seen_enough else Verdict.KEEP_ALL

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        size = image.features_per_tile
        far, is_late = likeness(image.features, size).neg_().add_(1), is_broken(image.features, size)
        quotas = even_quotas(allowance.count(far.new_zeros(image.num_features)), len(far))
        gain, total = far.masked_fill_(is_late[:, None], 0).sum(dim=2), torch.zeros_like(far[:, 0])
        is_taken = torch.zeros_like(is_late)
        picks = []
        for _ in range(max(quotas)):
            pick = next_pick(gain, is_taken, is_late)
            picks.append(pick)
            gain = total = total + far.take_along_dim(pick[..., None], dim=1)[:, 0]
        return Choice(first_of(torch.cat(picks, dim=1), quotas, size))
