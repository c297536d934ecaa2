"""The policy `vflowopt`: what the most attended features of the image attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice, EncodedImage, Observation
from trimserve.trimming.policies.policy import BeforeDecoder, parameter, top

__all__ = ["VFlowOpt"]

_ROWS = 64
"""Rows of the attention map that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class VFlowOpt(BeforeDecoder):
    """Features are ranked by the attention of the *global* ones, those that receive far more attention than the mean.

        A[m, n]  = mean_h softmax_n(q[h, m] . k[h, n] * scale), in the last but one local vision layer
        global   = features n with mean_m A[m, n] > global_threshold / N; if there is none, the one with the largest
        score[n] = mean_{g global} A[g, n] + entropy_weight * softmax_n(entropy of the patch's grey values)

    Source: VFlowOpt, arXiv 2508.05211, importance score; its released configurations set the weight of the entropy to
    0. Adapted: Mllama's encoder has no pooling head, so its own map is taken, over the image's features alone. Left
    out: pruning again in layers of the language model, which need attention among visual features. Its calibration, a
    search for these parameters without answers, is `trimserve eval --calibrate` with `--keep`
    (`evaluation/parameters.py`).
    """

    name: ClassVar[str] = "vflowopt"
    needs: ClassVar[frozenset[Observation]] = frozenset({"vision_attention", "patch_entropy"})

    global_threshold: float = parameter(
        30.0, 0, 10000, "A feature is global if it receives more than this many times the mean attention."
    )
    entropy_weight: float = parameter(0.0, 0, 100, "Of the patches' entropy.")

    def choose(self, image: EncodedImage, allowance: Allowance) -> Choice:
        """See `BeforeDecoder.choose`."""
        queries, keys = image.observed["vision_attention"].transpose(1, 2)
        keys = keys.float()
        num_features = image.num_features
        received = torch.zeros(num_features, device=queries.device)
        for rows in queries.split(_ROWS, dim=1):
            received += _attention(rows, keys).sum(dim=0) / num_features
        is_global = received > self.global_threshold / num_features
        if not is_global.any():
            is_global[top(received, 1)] = True
        scores = torch.zeros_like(received)
        for rows in queries[:, is_global].split(_ROWS, dim=1):
            scores += _attention(rows, keys).sum(dim=0) / is_global.sum()
        scores += self.entropy_weight * image.observed["patch_entropy"].softmax(dim=0)
        return Choice(top(scores, allowance.count(scores)))


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads, [R, N], of queries [heads, R, Dh] on keys [heads, N, Dh]."""
    logits: Tensor = queries.float() @ keys.transpose(1, 2) * queries.shape[2] ** -0.5
    return logits.softmax(dim=2).mean(dim=0)
