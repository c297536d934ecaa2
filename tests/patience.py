"""How tests wait for what must happen: as long as it takes on the busiest machine; only a failure takes so long."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["PATIENCE_SECONDS", "soon", "until"]

PATIENCE_SECONDS = 60

T = TypeVar("T")


async def soon(awaited: Awaitable[T]) -> T:
    """What is awaited."""
    return await asyncio.wait_for(awaited, PATIENCE_SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for happens on another thread, or has no event
            await asyncio.sleep(0.001)
