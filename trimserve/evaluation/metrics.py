"""Figures of an evaluation: exact match, divergence of distributions, and how far chance moves a mean."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bootstrap", "Estimate", "cosine", "is_match", "kl_divergence", "top_kl_divergence"]

Floats = NDArray[np.float64]

_DIGITS = 6  # of estimates; far below what chance does to them, and reports stay small
_LEAST_PROBABILITY = 1e-9  # of what a list of the likeliest tokens leaves over; float32 sums may pass 1


def is_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case, white space and a full stop at the end.

    >>> is_match(" A red  star.", "a red star")
    True
    """
    return _normalised(answer) == _normalised(expected)


def cosine(p: Floats, q: Floats) -> float:
    """Cosine of the angle between two vectors [D] that are not 0, in [-1, 1]."""
    return float(p @ q / np.sqrt((p @ p) * (q @ q)))


def kl_divergence(p: Floats, q: Floats) -> float:
    """How far the distribution q is from p: KL(p || q) in nats, at least 0.

    Args:
        p: float64 [V], natural logarithms of probabilities that sum to 1; may be -inf.
        q: float64 [V], the same.
    """
    is_possible = p > -np.inf
    p, q = p[is_possible], q[is_possible]
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def top_kl_divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """A lower bound of KL(p || q) from the likeliest tokens alone.

    Tokens that both lists name are told apart, all others are one event; merging events can only lower the
    divergence.

    Args:
        p: token id -> natural logarithm of its probability, for the likeliest tokens.
        q: the same of the other distribution.
    Returns:
        Nats, at least 0; 0 when the lists are equal.
    """
    shared = sorted(p.keys() & q.keys())
    return kl_divergence(*(_with_rest(np.array([top[token_id] for token_id in shared])) for top in (p, q)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """95 % intervals of means over questions, by drawing the images anew.

    Questions on one image share its luck, so whole images are drawn. Every mean comes from the same draws: the
    interval of a difference of two settings, given as the mean of `a - b`, is a paired one.
    """

    def __init__(self, images: NDArray[np.int64], *, num_draws: int = 2000, seed: int = 0) -> None:
        """Draw.

        Args:
            images: int64 [Q], which image each question is about.
            num_draws: data sets to draw, at least 1.
            seed: of the draws.
        """
        _, index = np.unique(images, return_inverse=True)
        num_images = int(index.max()) + 1
        drawn = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), num_draws)
        self._weights = drawn[:, index].astype(np.float32)  # [draws, Q], how often each question is drawn

    def mean(self, values: NDArray[np.float64], where: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean of one number per question.

        Args:
            values: [Q].
            where: [Q], the questions that count, at least one; None: all.
        """
        weights = self._weights
        if where is not None:
            weights, values = weights[:, where], values[where]
        totals = weights.sum(axis=1)
        has_any = totals > 0  # a draw may have none of a rare kind
        means = (weights @ values.astype(np.float32))[has_any] / totals[has_any]
        low, high = np.percentile(means, (2.5, 97.5))
        return Estimate(*(round(float(figure), _DIGITS) for figure in (values.mean(), low, high)))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _with_rest(logprobs: Floats) -> Floats:
    rest = max(_LEAST_PROBABILITY, 1.0 - float(np.exp(logprobs).sum()))
    return np.append(logprobs, np.log(rest))
