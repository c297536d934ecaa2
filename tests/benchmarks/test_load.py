"""What is asked and when, and what an exchange's times are."""

import io
import threading
import time
from dataclasses import dataclass, field
from statistics import mean

import pytest
from PIL import Image

from benchmarks.load import Answer, Item, closed_loop, make_workload, open_loop, poisson_arrivals
from tests.benchmarks.conftest import Maker


@dataclass
class Target:
    """Answers after a time, and remembers how many asked at once and in which order."""

    seconds: float
    num_asking: int = 0
    most_asking: int = 0
    order: list[int] = field(default_factory=list)
    asked: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, item: Item) -> Answer:
        with self.lock:
            self.order.append(item.index)
            self.asked[item.index] = time.monotonic()
            self.num_asking += 1
            self.most_asking = max(self.most_asking, self.num_asking)
        time.sleep(self.seconds)  # so that the others ask meanwhile
        with self.lock:
            self.num_asking -= 1
        return Answer(error="refused") if item.index == 2 else Answer((time.monotonic(),), 1)


def test_a_closed_loop_keeps_as_many_requests_open_as_it_has_clients(make: Maker) -> None:
    target = Target(0.05)
    exchanges = closed_loop(target.ask, [make.item(index) for index in range(10)], concurrency=3)
    assert target.most_asking == 3
    assert sorted(target.order) == list(range(10))
    assert [exchange.item.index for exchange in exchanges] == list(range(10))


def test_a_client_goes_on_after_an_error(make: Maker) -> None:
    exchanges = closed_loop(Target(0.0).ask, [make.item(index) for index in range(4)], concurrency=1)
    assert [exchange.answer.error for exchange in exchanges] == [None, None, "refused", None]


def test_an_open_loop_sends_on_time_whatever_became_of_those_before(make: Maker) -> None:
    target = Target(0.5)
    exchanges = open_loop(target.ask, [make.item(index) for index in range(4)], [0.0, 0.005, 0.01, 0.015])
    assert target.most_asking == 4
    gaps = [exchange.sent - exchanges[0].sent for exchange in exchanges]
    assert gaps == pytest.approx([0.0, 0.005, 0.01, 0.015])
    assert all(target.asked[exchange.item.index] >= exchange.sent for exchange in exchanges)


def test_waiting_in_an_open_loop_counts_from_when_the_request_was_due(make: Maker) -> None:
    [late] = open_loop(lambda _: Answer((time.monotonic(),), 1), [make.item()], [-0.03])
    assert late.time_to_first_token >= 0.03


def test_times_of_an_exchange_are_differences_of_its_stamps(make: Maker) -> None:
    exchange = make.exchange(1.0, 1.5, 1.75, 2.25)
    assert exchange.time_to_first_token == 0.5
    assert exchange.gaps == [0.25, 0.5]
    assert exchange.time_per_output_token == 0.375


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
