"""Which adapters requests may name, and how many requests have each.

Belongs to the event loop, where requests enter and end. How an adapter is read and forgotten is handed in.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trimserve.api.adapter import AdapterInfo, LoadedAdapter
from trimserve.errors import AdapterExists, EngineStopped, UnknownAdapter

__all__ = ["Adapters"]

T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    """An adapter from the moment that it is asked for until it is gone."""

    info: AdapterInfo | None = None
    """None while it is read."""
    num_requests: int = 0
    has_none: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request has it; looked at once it is unloading."""
    unloading: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        self.has_none.set()

    @property
    def state(self) -> str:
        """For messages."""
        if self.unloading is not None:
            return "being unloaded"
        return "loaded" if self.info is not None else "being loaded"


class Adapters:
    """The adapters of one server, by name."""

    def __init__(self) -> None:
        """None yet."""
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all that are loaded, those that are being unloaded too."""
        return sum(entry.info.num_bytes for entry in self._entries.values() if entry.info is not None)

    def loaded(self) -> tuple[LoadedAdapter, ...]:
        """All that are loaded, in the order of loading."""
        return tuple(
            LoadedAdapter(entry.info, entry.num_requests, is_unloading=entry.unloading is not None)
            for entry in self._entries.values()
            if entry.info is not None
        )

    def take(self, name: str, *, is_held: bool = False) -> None:
        """A request that has it begins.

        Args:
            name: of the adapter.
            is_held: whether the request has it already and takes it again, for which an unload waits.
        Raises:
            UnknownAdapter: it is not loaded.
        """
        entry = self._entry(name)
        if entry.unloading is not None and not is_held:
            raise UnknownAdapter(f"adapter {name!r} is being unloaded")
        entry.num_requests += 1
        entry.has_none.clear()

    def give_back(self, name: str) -> None:
        """A request that had it has ended."""
        entry = self._entries[name]
        entry.num_requests -= 1
        if not entry.num_requests:
            entry.has_none.set()

    async def load(self, name: str, read: Callable[[], Awaitable[AdapterInfo]]) -> AdapterInfo:
        """Read an adapter, which requests may name from then on; goes on if nobody waits for it any more.

        Args:
            name: new.
            read: called once.
        Raises:
            AdapterExists: there is one of that name.
            Exception: what `read` raised.
        """
        if (other := self._entries.get(name)) is not None:
            raise AdapterExists(f"adapter {name!r} is {other.state}")
        entry = self._entries[name] = _Entry()
        return await self._shielded(self._task(self._load(name, entry, read)))

    async def unload(self, name: str, forget: Callable[[], Awaitable[None]]) -> None:
        """Refuse new requests, wait for those that have it, forget it; goes on if nobody waits for it any more.

        Args:
            name: of a loaded adapter; of one that is being unloaded, its end is awaited.
            forget: called once, when no request has it.
        Raises:
            UnknownAdapter: it is not loaded.
            EngineStopped: the engine stopped first.
        """
        entry = self._entry(name)
        if entry.unloading is None:
            entry.unloading = self._task(self._unload(name, entry, forget))
        await self._shielded(entry.unloading)

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or entry.info is None:
            known = ", ".join(repr(adapter.info.name) for adapter in self.loaded()) or "none"
            raise UnknownAdapter(f"adapter {name!r} is not loaded; loaded are {known}")
        return entry

    async def _load(self, name: str, entry: _Entry, read: Callable[[], Awaitable[AdapterInfo]]) -> AdapterInfo:
        try:
            entry.info = await read()
        except BaseException:
            del self._entries[name]
            raise
        return entry.info

    async def _unload(self, name: str, entry: _Entry, forget: Callable[[], Awaitable[None]]) -> None:
        await entry.has_none.wait()
        await forget()
        del self._entries[name]

    def _task(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio would complain of one that nobody waited for

    async def _shielded(self, task: "asyncio.Task[T]") -> T:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, and not who waits for it
                raise EngineStopped("the engine stopped before the adapter was loaded or unloaded") from None
            raise
