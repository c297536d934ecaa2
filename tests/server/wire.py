"""What lies between a client and a server: a relay of TCP connections that counts what passes, or loses it."""

import asyncio
from contextlib import suppress
from types import TracebackType


class Relay:
    """Forwards connections to an address, in the running event loop."""

    def __init__(self, target: str) -> None:
        """Forward to `HOST:PORT`."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._is_thawed = asyncio.Event()
        self._is_thawed.set()
        self.num_connections = 0
        self.num_bytes_up = 0
        self.num_bytes_down = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def freeze(self) -> None:
        """Forward nothing any more and close nothing, as a network that has lost one end."""
        self._is_thawed.clear()

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()  # also what was never sent
        await asyncio.sleep(0)  # a transport lets go of its socket in the loop's next round

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.append(writer)
        self.num_connections += 1
        server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        self._writers.append(server_writer)
        try:
            with suppress(asyncio.CancelledError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, server_writer, "num_bytes_up"))
                    group.create_task(self._pump(server_reader, writer, "num_bytes_down"))
        finally:
            writer.close()
            server_writer.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._is_thawed.wait()
                setattr(self, counter, getattr(self, counter) + len(data))
                writer.write(data)
                await writer.drain()
            writer.write_eof()
