"""Allowances of clients, by an injected clock."""

import pytest

from trimserve.errors import TooFast
from trimserve.server.rates import Rates
from trimserve.server.tokens import Caller


class Clock:
    """Stands still but for `pass_`."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def caller(name: str = "shop", **rates: int) -> Caller:
    return Caller(name, frozenset(), rates=rates)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minute_may_be_used_at_once_and_comes_back_evenly(clock: Clock) -> None:
    rates, shop = Rates(clock), caller(requests_per_minute=6)
    for _ in range(6):
        rates.check(shop)
        rates.spend(shop, "requests_per_minute", 1)
    with pytest.raises(TooFast, match=r"shop has had .* a minute, 6 \(requests_per_minute\)") as caught:
        rates.check(shop)
    assert caught.value.retry_after_seconds == pytest.approx(10)
    clock.pass_(10)
    rates.check(shop)


def test_a_call_that_took_more_than_was_left_is_paid_by_the_next_ones(clock: Clock) -> None:
    rates, shop = Rates(clock), caller(tokens_per_minute=60)
    rates.check(shop)
    rates.spend(shop, "tokens_per_minute", 150)
    with pytest.raises(TooFast) as caught:
        rates.check(shop)
    assert caught.value.retry_after_seconds == pytest.approx(91)
    clock.pass_(91)
    rates.check(shop)


def test_nobody_saves_up_more_than_a_minute(clock: Clock) -> None:
    rates, shop = Rates(clock), caller(bytes_per_minute=100)
    rates.check(shop)
    clock.pass_(3600)
    rates.spend(shop, "bytes_per_minute", 100)
    with pytest.raises(TooFast):
        rates.check(shop)


def test_clients_and_allowances_are_apart(clock: Clock) -> None:
    rates, shop = Rates(clock), caller(requests_per_minute=1, tokens_per_minute=5)
    rates.spend(shop, "requests_per_minute", 1)
    rates.check(caller("other", requests_per_minute=1))
    with pytest.raises(TooFast, match="requests_per_minute"):
        rates.check(shop)
    rates.check(caller("shop", tokens_per_minute=5))


def test_a_client_without_allowances_goes_as_fast_as_it_likes(clock: Clock) -> None:
    rates, shop = Rates(clock), caller()
    rates.spend(shop, "tokens_per_minute", 10**9)
    rates.check(shop)


def test_an_allowance_that_changes_begins_anew(clock: Clock) -> None:
    rates = Rates(clock)
    rates.spend(caller(requests_per_minute=1), "requests_per_minute", 100)
    rates.check(caller(requests_per_minute=2))
