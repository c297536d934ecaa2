"""Finds features that say nothing, for the policy `codebook`: offline, from questions that need no answers.

A feature is redundant for a question if two things hold. *Alone* it says nothing: the first token's distribution is as
far from what the model says unseeing as with other features, or nearer. And it *is not missed*: without it the
distribution is as near to that of the whole image. Directions of redundant features are clustered; the centres are the
codebook.

Source: Beyond Intermediate States, arXiv 2503.20540. Adapted: both tests compare distributions by their Jensen-Shannon
divergence and with thresholds that are quantiles, which need not be set for each model; a sample of each image's
features is tested, because a test is a prefill; clusters are spherical k-means instead of density peaks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.engine.memory import available_bytes
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.evaluation.dataset import DatasetError, Question
from trimserve.evaluation.in_process import prepare_question
from trimserve.evaluation.pages import OwnPages
from trimserve.model.decoder import SequenceRows
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.tiles import directions

__all__ = ["find_prototypes", "js_divergence", "k_means"]

_BATCH: Final = 16
"""Tests that run together; each holds the keys and values of nearly a whole image."""
_ROUNDS: Final = 100
"""Of k-means, at most."""


def find_prototypes(
    model: Mllama,
    questions: Sequence[Question],
    *,
    num_prototypes: int,
    features_per_question: int,
    redundant_ratio: float,
    seed: int,
    on_question: Callable[[], None] = lambda: None,
) -> Tensor:
    """Find what redundant features look like; the same every time.

    Args:
        model: nothing else uses it meanwhile.
        questions: at least one; answers are not asked for.
        num_prototypes: P, at least 1.
        features_per_question: of each image, drawn anew for every question, at least 1.
        redundant_ratio: quantile in (0, 1], among all that are tested, that both of a feature's divergences must not
            pass.
        seed: of what is drawn.
        on_question: called after each question.
    Returns:
        float32 [P, hidden_size], each of length 1.
    Raises:
        DatasetError: fewer redundant features than prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = OwnPages(model.info, available_bytes(model.info.device) // 2)
    tested, divergences = [], []
    for question in questions:
        prompt = prepare_question(model, question)
        image = run_through(model.encode_image(prompt.images[0]))
        picks = torch.randperm(image.num_features, generator=generator)[:features_per_question]
        tested.append(directions(image.features[picks.to(image.features.device)]))
        divergences.append(_divergences(model, pool, prompt, image, picks.tolist()))
        on_question()
    both = torch.cat(divergences, dim=1)
    is_redundant = (both <= both.quantile(redundant_ratio, dim=1, keepdim=True)).all(dim=0)
    redundant = torch.cat(tested)[is_redundant.to(tested[0].device)]
    if len(redundant) < num_prototypes:
        raise DatasetError(
            f"must have {num_prototypes} redundant features for as many prototypes, got {len(redundant)} of "
            f"{both.shape[1]} tested: ask more questions, or test more features of each"
        )
    return k_means(redundant, num_prototypes, generator)


def _divergences(
    model: Mllama, pool: OwnPages, prompt: PreparedPrompt, image: EncodedImage, picks: Sequence[int]
) -> Tensor:
    """float64 [2, S]: of each pick, what it says alone and what the image lacks without it."""
    everything = image.features
    whole, unseeing = _first_token(model, pool, prompt, [everything, everything[:0]])

    def of_picks(features: Callable[[int], Tensor], usual: Tensor) -> Tensor:
        """How far the first token is from usual with the features of each pick."""
        parts = [
            js_divergence(_first_token(model, pool, prompt, [features(pick) for pick in batch]), usual)
            for batch in _batches(picks)
        ]
        return torch.cat(parts)

    return torch.stack(
        [
            of_picks(lambda pick: everything[pick : pick + 1], unseeing),
            of_picks(lambda pick: torch.cat([everything[:pick], everything[pick + 1 :]]), whole),
        ]
    )


def _batches(picks: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(picks), _BATCH):
        yield picks[first : first + _BATCH]


def _first_token(model: Mllama, pool: OwnPages, prompt: PreparedPrompt, views: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the first token, float64 [B, vocab_size], if the image has these features, [n, D] each."""
    length, size = len(prompt.token_ids), model.info.features_per_tile
    kvs = [pool.key_values(length, len(view)) for view in views]
    rows: list[SequenceRows] = [
        model.prompt_rows(prompt, [EncodedImage(view, size)] if len(view) else [], TrimPlan.of(UNTRIMMED), kv)
        for view, kv in zip(views, kvs, strict=True)
    ]
    logits = model.logits(rows, [*prompt.token_ids] * len(views))[length - 1 :: length]
    for kv in kvs:
        kv.release()
    return logits.double().log_softmax(dim=-1).cpu()


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, in [0, ln 2].

    Args:
        p: [..., V], natural logarithms of probabilities that sum to 1.
        q: the same.
    Returns:
        [...]
    """
    middle = torch.logaddexp(p, q) - math.log(2)
    from_p, from_q = ((part.exp() * (part - middle)).sum(dim=-1) for part in (p, q))
    return (from_p + from_q) / 2


def k_means(directions: Tensor, num_centres: int, generator: torch.Generator) -> Tensor:
    """Centres of clusters of directions, each of length 1.

    The first centre is drawn, each of the next is the direction furthest from all before. A cluster that loses its
    last member keeps its centre.

    Args:
        directions: float32 [S, D], of length 1.
        num_centres: P, in [1, S].
        generator: draws.
    Returns:
        float32 [P, D].
    """
    first = int(torch.randint(len(directions), (), generator=generator))
    centres = directions[first : first + 1]
    closest = directions @ centres[0]
    for _ in range(num_centres - 1):
        centres = torch.cat([centres, directions[closest.argmin()][None]])
        closest = torch.maximum(closest, directions @ centres[-1])
    cluster = None
    for _ in range(_ROUNDS):
        nearest = (directions @ centres.T).argmax(dim=1)
        if cluster is not None and torch.equal(nearest, cluster):
            break
        cluster = nearest
        sums = torch.zeros_like(centres).index_add_(0, cluster, directions)
        centres = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), centres)
    return centres
