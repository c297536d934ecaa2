"""Exact match, divergences and bootstrap intervals: hand-worked."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from trimserve.evaluation.metrics import Bootstrap, cosine, is_match, kl_divergence, top_kl_divergence


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("yes", "yes", True),
        (" Yes.\n", "yes", True),
        ("a red  star", "A red star.", True),
        ("BOAT", "boat", True),
        ("3.5", "3 5", False),
        ("red star", "a red star", False),
        ("", "yes", False),
    ],
)
def test_case_white_space_and_a_final_full_stop_do_not_count(answer: str, expected: str, same: bool) -> None:
    assert is_match(answer, expected) is same


def logs(*probabilities: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Logarithms, of 0 as well."""
    return np.array([math.log(p) if p else -math.inf for p in probabilities])


@pytest.mark.parametrize(
    ("p", "q", "nats"),
    [
        ((0.5, 0.5), (0.5, 0.5), 0.0),
        ((0.5, 0.5), (0.25, 0.75), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ((1.0, 0.0), (0.5, 0.5), math.log(2)),  # what p never does costs nothing
        ((0.5, 0.5), (1.0, 0.0), math.inf),
    ],
)
def test_kl_divergence(p: tuple[float, ...], q: tuple[float, ...], nats: float) -> None:
    assert kl_divergence(logs(*p), logs(*q)) == pytest.approx(nats)


def test_cosine_is_of_directions() -> None:
    assert cosine(np.array([3.0, 4.0]), np.array([8.0, 6.0])) == pytest.approx(0.96)


def test_top_kl_divergence_lumps_what_the_lists_do_not_share() -> None:
    p = {1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.1)}
    q = {1: math.log(0.25), 2: math.log(0.3), 4: math.log(0.2)}
    # Shared: 1 and 2. The rest: 0.2 against 0.45.
    expected = 0.5 * math.log(2) + 0.2 * math.log(0.2 / 0.45)
    assert top_kl_divergence(p, q) == pytest.approx(expected)
    assert top_kl_divergence(p, p) == 0


@given(st_np.arrays(np.float64, (2, 12), elements=st.floats(-8, 8)), st.integers(1, 12))
def test_top_kl_divergence_never_exceeds_the_whole(
    logits: np.ndarray[tuple[int, int], np.dtype[np.float64]], top: int
) -> None:
    p, q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    lists = ({int(i): float(row[i]) for i in np.argsort(-row)[:top]} for row in (p, q))
    assert top_kl_divergence(*lists) <= kl_divergence(p, q) + 1e-7


def test_the_interval_of_a_fair_coin_is_the_binomial_one() -> None:
    values = (np.arange(400) % 2).astype(np.float64)
    estimate = Bootstrap(np.arange(400)).mean(values)
    assert estimate.value == 0.5
    half = 1.96 * 0.5 / math.sqrt(400)
    assert estimate.low == pytest.approx(0.5 - half, abs=0.005)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.005)


def test_questions_on_one_image_are_drawn_together() -> None:
    images = np.repeat(np.arange(100), 4)
    values = np.repeat(np.arange(100) % 2.0, 4)  # an image's questions are all right or all wrong
    estimate = Bootstrap(images).mean(values)
    half = 1.96 * 0.5 / math.sqrt(100)
    assert estimate.low == pytest.approx(0.5 - half, abs=0.01)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.01)


def test_a_difference_is_paired() -> None:
    is_right = np.arange(100) % 2.0
    bootstrap = Bootstrap(np.arange(100))
    difference = bootstrap.mean((is_right - 0.25) - is_right)  # always the same, however much the terms vary
    assert (difference.value, difference.low, difference.high) == (-0.25, -0.25, -0.25)


def test_a_kind_that_few_images_have_gets_an_interval_all_the_same() -> None:
    values = np.array([1.0, 0.0, 0.0, 1.0])
    estimate = Bootstrap(np.arange(4)).mean(values, np.array([True, False, False, False]))
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
