"""The outbox: order, one wake-up for many items, and how long items wait for each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from trimserve.api.chunks import TokenDelta
from trimserve.engine import outbox as module
from trimserve.engine.outbox import Outbox
from trimserve.engine.stream import Stream
from trimserve.errors import RequestFailed


@dataclass
class Loop:
    """An event loop whose clocks are set by hand."""

    now: float = 100.0
    busy: float = 5.0
    soon: list[Callable[[], None]] = field(default_factory=list)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self.later.append((when, callback))

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.busy

    def run(self) -> None:
        """Call what is due."""
        due = [callback for when, callback in self.later if when <= self.now]
        self.later = [item for item in self.later if item[0] > self.now]
        ready, self.soon = self.soon + due, []
        for callback in ready:
            callback()

    def work(self, seconds: float) -> None:
        """Let time pass in which the loop is busy."""
        self.now += seconds
        self.busy += seconds


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(module, "time", loop)
    return loop


def make(loop: Any) -> tuple[Outbox, list[tuple[str, str]]]:
    delivered: list[tuple[str, str]] = []

    def deliver(stream: Stream, item: object) -> None:
        assert isinstance(item, TokenDelta)
        delivered.append((stream.request_id, item.text))

    return Outbox(loop, deliver), delivered


def streams(count: int) -> list[Stream]:
    return [Stream(f"r{index}", 0, 0.0) for index in range(count)]


def put(outbox: Outbox, members: list[Stream], text: str) -> None:
    for stream in members:
        outbox.put(stream, TokenDelta(text, (1,), ()))


def test_items_come_in_order_with_one_wake_up(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(2)
    put(outbox, members, "a")
    put(outbox, members, "b")
    assert len(loop.soon) == 1
    loop.run()
    assert delivered == [("r0", "a"), ("r1", "a"), ("r0", "b"), ("r1", "b")]


def test_a_stream_that_is_alone_waits_no_longer_than_its_last_message_took(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(1)
    put(outbox, members, "a")
    loop.run()
    loop.work(0.001)
    put(outbox, members, "b")
    loop.run()
    assert delivered == [("r0", "a"), ("r0", "b")]


def test_many_streams_wait_as_often_as_long_as_messages_take(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(8)
    put(outbox, members, "a")
    loop.run()
    loop.work(0.001)
    put(outbox, members, "b")
    loop.run()
    assert len(delivered) == 8
    loop.now += 0.0069
    put(outbox, members, "c")  # while they wait
    loop.run()
    assert len(delivered) == 8
    loop.now += 0.0002
    loop.run()
    assert delivered[8:] == [(f"r{index}", text) for text in "bc" for index in range(8)]


def test_nobody_waits_long(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(100)
    put(outbox, members, "a")
    loop.run()
    loop.work(0.015)
    put(outbox, members, "b")
    loop.run()
    loop.now += 0.0051
    loop.run()
    assert len(delivered) == 200


def test_what_comes_after_a_pause_is_delivered_at_once(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(8)
    put(outbox, members, "a")
    loop.run()
    loop.now += 1.0
    put(outbox, members, "b")
    loop.run()
    assert len(delivered) == 16


def test_a_stream_that_is_alone_waits_while_its_last_message_would_take_more_than_half_of_the_time(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(1)
    put(outbox, members, "a")
    loop.run()
    loop.busy += 0.001
    loop.now += 0.0005
    put(outbox, members, "b")
    loop.run()
    assert len(delivered) == 1
    loop.now += 0.0006
    loop.run()
    assert len(delivered) == 2


def test_what_waits_can_be_delivered_at_once_and_comes_once(loop: Loop) -> None:
    outbox, delivered = make(loop)
    members = streams(4)
    put(outbox, members, "a")
    loop.run()
    loop.work(0.001)
    put(outbox, members, "b")
    loop.run()
    outbox.flush()
    assert len(delivered) == 8
    loop.now += 1.0
    loop.run()
    assert len(delivered) == 8


@pytest.mark.parametrize("num_failures", [1, 9])
def test_what_cannot_be_delivered_ends_its_own_stream(loop: Any, num_failures: int) -> None:
    failures = iter([ValueError("no room")] * num_failures)
    delivered: list[tuple[str, object]] = []

    def deliver(stream: Stream, item: object) -> None:
        if stream.request_id == "r1" and (error := next(failures, None)) is not None:
            raise error
        delivered.append((stream.request_id, item if isinstance(item, TokenDelta) else type(item)))

    outbox = Outbox(loop, deliver)
    put(outbox, streams(3), "a")
    loop.run()
    delta = TokenDelta("a", (1,), ())
    of_failed: list[tuple[str, object]] = [("r1", RequestFailed)] if num_failures == 1 else []
    assert delivered == [("r0", delta), *of_failed, ("r2", delta)]
