"""Room for messages: bounded for all and for each, handed out in order of arrival."""

import asyncio

import pytest

from tests.patience import soon
from trimserve.server.message_bytes import Hold, MessageBytes


def granted(*waiters: "asyncio.Future[Hold]") -> list[bool]:
    return [waiter.done() for waiter in waiters]


async def arrived(room: MessageBytes, *clients: str) -> list["asyncio.Task[Hold]"]:
    """One message of each client, in this order."""
    waiters = [asyncio.ensure_future(room.take(client)) for client in clients]
    await settled()
    return waiters


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_room_for_the_largest_is_set_aside_and_given_back_down_to_the_real_size() -> None:
    room = MessageBytes(40, 10)
    hold = await room.take("a")
    assert room.in_flight == 10
    hold.shrink(3)
    assert room.in_flight == 3
    hold.shrink(5)
    assert room.in_flight == 3
    hold.shrink(0)
    hold.shrink(0)
    assert room.in_flight == 0


async def test_who_finds_no_room_waits_in_order() -> None:
    room = MessageBytes(20, 10)
    first = await room.take("a")
    second = await room.take("b")
    waiters = await arrived(room, "c", "d")
    assert granted(*waiters) == [False, False]
    first.shrink(0)
    await settled()
    assert granted(*waiters) == [True, False]
    second.shrink(0)
    await settled()
    assert granted(*waiters) == [True, True]


async def test_a_client_that_has_its_half_lets_others_pass() -> None:
    room = MessageBytes(40, 10)
    greedy = await arrived(room, "a", "a", "a", "b")
    assert granted(*greedy) == [True, True, False, True]
    greedy[0].result().shrink(0)
    await settled()
    assert granted(*greedy) == [True, True, True, True]


async def test_a_waiter_that_gives_up_takes_nothing() -> None:
    room = MessageBytes(10, 10)
    hold = await room.take("a")
    gone, patient = await arrived(room, "b", "c")
    gone.cancel()
    await settled()
    hold.shrink(0)
    assert (await soon(patient)).client == "c"
    assert room.in_flight == 10


async def test_a_waiter_that_gives_up_as_its_room_comes_gives_it_back() -> None:
    room = MessageBytes(10, 10)
    hold = await room.take("a")
    (gone,) = await arrived(room, "b")
    hold.shrink(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert room.in_flight == 0


async def test_nobody_takes_room_at_once_that_others_wait_for() -> None:
    room = MessageBytes(20, 10)
    assert room.take_now("a") is not None
    assert room.take_now("b") is not None
    assert room.take_now("c") is None


async def test_one_message_always_fits() -> None:
    room = MessageBytes(10, 10)
    assert (await soon(room.take("a"))).num_bytes == 10
