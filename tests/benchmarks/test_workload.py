"""Workloads: the same for equal settings, with the mix that was asked for."""

import io
from statistics import mean

import pytest
from PIL import Image

from benchmarks.load import make_workload, poisson_arrivals


def test_equal_settings_give_equal_items() -> None:
    assert make_workload(16, 32, seed=3) == make_workload(16, 32, seed=3)


def test_another_seed_gives_other_questions_and_images() -> None:
    other = make_workload(16, 32, seed=4)
    ours = make_workload(16, 32, seed=3)
    assert {item.question for item in ours} != {item.question for item in other}
    assert not {item.images for item in ours if item.images} & {item.images for item in other}


def test_kinds_have_their_shares_and_stand_in_the_order_of_their_index() -> None:
    items = make_workload(16, 32, seed=3)
    kinds = [item.kind for item in items]
    assert (kinds.count("four_tiles"), kinds.count("one_tile"), kinds.count("text")) == (8, 4, 4)
    assert [item.index for item in items] == list(range(16))
    assert kinds != sorted(kinds)


def test_half_of_the_images_were_shown_before() -> None:
    shown: set[bytes] = set()
    num_repeated = 0
    for item in make_workload(16, 32, seed=3):
        num_repeated += bool(shown.intersection(item.images))
        shown.update(item.images)
    assert num_repeated == 6


def test_a_picture_fills_its_tiles() -> None:
    sides = {"four_tiles": 64, "one_tile": 32}
    for item in make_workload(16, 32, seed=3):
        for image in item.images:
            assert Image.open(io.BytesIO(image)).size == (sides[item.kind],) * 2


def test_arrivals_ascend_at_the_rate_that_was_asked_for() -> None:
    arrivals = poisson_arrivals(2000, requests_per_second=50, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert arrivals == sorted(arrivals)
    assert mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    # Of independent arrivals 1 - 1/e of the gaps are below the mean.
    assert mean(gap < 1 / 50 for gap in gaps) == pytest.approx(0.632, abs=0.05)
    assert arrivals == poisson_arrivals(2000, requests_per_second=50, seed=1)
