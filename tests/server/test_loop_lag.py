"""How late the event loop is, with a clock that is moved."""

import asyncio

from tests.patience import until
from tests.server.test_reloaded import Clock
from trimserve.server.loop_lag import INTERVAL_SECONDS, LoopLag


async def test_a_turn_that_comes_late_is_measured_and_one_that_does_not_come_is_seen_from_outside() -> None:
    clock, seen = Clock(), list[float]()
    lag = LoopLag(seen.append, clock)
    assert lag.stalled_seconds == 0
    task = asyncio.create_task(lag.follow())
    await asyncio.sleep(0)
    assert lag.stalled_seconds == 0
    clock.now = INTERVAL_SECONDS + 3
    assert lag.stalled_seconds == 3
    await until(lambda: bool(seen))
    assert seen == [3]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    clock.now = 1000
    assert lag.stalled_seconds == 0
