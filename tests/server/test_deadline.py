"""Deadlines as plain seconds, as any transport has them."""

import time

import pytest

from trimserve.config import ServerConfig
from trimserve.server.deadline import Deadline


@pytest.mark.parametrize(
    ("client", "longest", "bound"),
    [(None, None, None), (100, None, 100), (None, 300, 300), (400, 300, 300), (100, 300, 100)],
)
def test_the_engine_gets_the_clients_deadline_but_no_later_than_the_longest(
    client: float | None, longest: float | None, bound: float | None
) -> None:
    now = time.monotonic()
    got = Deadline(client).bounded(ServerConfig(max_deadline_seconds=longest))
    assert got == (None if bound is None else pytest.approx(now + bound, abs=10))


def test_a_call_without_a_deadline_never_passes_it() -> None:
    assert not Deadline(None).has_passed()


def test_a_cancellation_a_moment_before_the_deadline_counts_as_the_deadline() -> None:
    assert Deadline(0.01).has_passed()
    assert not Deadline(1000).has_passed()
