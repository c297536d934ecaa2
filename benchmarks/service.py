"""A trimserve server in a process of its own, asked over gRPC and watched while it works."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.load import Answer
from benchmarks.workload import Item
from trimserve.client import channel_options, make_request
from trimserve.process import ServerProcess, server_process
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["GrpcTarget", "Held", "Peak", "running_server"]

_MORE_TOKENS = 64
"""Beyond those that are asked for, so that a request still runs when its account is asked for."""

_POLL_SECONDS = 0.05


def running_server(
    model: Path | None, *, num_threads: int, flags: Sequence[str] = ()
) -> AbstractContextManager[ServerProcess]:
    """A server of a checkpoint, until the block ends; it logs only what is wrong.

    Args:
        model: folder of a checkpoint; None is the embedded model.
        num_threads: of one op.
        flags: more options of `trimserve serve`.
    """
    checkpoint = () if model is None else ("--model", str(model))
    return server_process("--num-threads", str(num_threads), "--log-level", "warning", *flags, *checkpoint)


@dataclass(slots=True)
class Peak:
    """The most that was seen of a server while it was watched."""

    pool_bytes: int = 0
    """Self- and cross-attention KV in use, whole pages."""
    cross_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What one request holds while it decodes, by the server's account: pages do not change until it ends."""

    self_bytes: int
    cross_bytes: int
    images: tuple[pb.ImageUsage, ...]
    num_prompt_tokens: int


class GrpcTarget:
    """Asks a trimserve server; an async context manager, used in one event loop."""

    def __init__(self, address: str, *, max_new_tokens: int, trim: pb.TrimOptions) -> None:
        """Connect when first asked.

        Args:
            address: `HOST:PORT`.
            max_new_tokens: of every answer, exactly: end tokens are ignored.
            trim: of every request.
        """
        options = [*channel_options(address=address), ("grpc.enable_retries", 0)]  # what is refused is to be seen
        self._channel = grpc.aio.insecure_channel(address, options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._max_new_tokens, self._trim = max_new_tokens, trim

    async def __aenter__(self) -> "GrpcTarget":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, item: Item) -> Answer:
        """See `load.Ask`."""
        arrivals: list[float] = []
        token_ids: list[int] = []
        finished = pb.Finished()
        try:
            async for event in self._stream(item):
                if event.delta.token_ids:
                    arrivals.append(time.monotonic())
                    token_ids += event.delta.token_ids
                elif event.HasField("finished"):
                    finished = event.finished
        except grpc.RpcError as error:
            return Answer(error=f"{error.code().name}: {error.details()}")
        images = finished.usage.images
        return Answer(
            arrivals=tuple(arrivals),
            num_tokens=len(token_ids),
            num_prompt_tokens=finished.usage.num_prompt_tokens,
            token_ids=tuple(token_ids),
            num_valid=sum(image.valid_features for image in images),
            num_kept=sum(image.kept_features + image.merged_features for image in images),
        )

    async def held(self, item: Item) -> Held:
        """Ask for the account when all `max_new_tokens` are there; the server must have nothing else to do."""
        num_tokens, started = 0, pb.Started()
        stream = self._stream(item, _MORE_TOKENS)
        async for event in stream:
            num_tokens += len(event.delta.token_ids)
            if event.HasField("started"):
                started = event.started
            elif num_tokens >= self._max_new_tokens:
                break
        status = await self.status()
        stream.cancel()
        assert status.num_running == 1, f"{status.num_running} requests run, one was asked about"
        return Held(status.self_kv_bytes, status.cross_kv_bytes, tuple(started.images), started.num_prompt_tokens)

    async def num_at_once(self, item: Item, num_clients: int) -> int:
        """How many of equal requests run at the same time.

        Args:
            item: what all ask. The server must prefill what fits before it decodes.
            num_clients: more than can run.
        """
        peak = 0

        async def client() -> None:
            """Go on until half of the answer is there, then look how many run."""
            nonlocal peak
            num_tokens = 0
            async for event in self._stream(item):
                num_tokens += len(event.delta.token_ids)
                if num_tokens > self._max_new_tokens // 2:  # whatever fits has come in by now
                    break
            status = await self.status()
            assert status.num_waiting, f"{num_clients} clients are too few to fill the pool"
            peak = status.num_running

        clients = {asyncio.create_task(client()) for _ in range(num_clients)}
        done, running = await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
        await asyncio.gather(*done)
        return peak

    async def status(self) -> model_pb2.GetServerStatusResponse:
        """The server's account now."""
        return await self._model.GetServerStatus(model_pb2.GetServerStatusRequest())

    async def tile_size(self) -> int:
        """Pixels along the side of the model's tiles."""
        return (await self._model.GetModel(model_pb2.GetModelRequest())).tile_size

    def _stream(
        self, item: Item, more_tokens: int = 0
    ) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse]:
        tokens = self._max_new_tokens + more_tokens
        sampling = pb.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=0)
        return self._generation.GenerateStream(
            make_request(item.question, item.images, sampling=sampling, trim=self._trim)
        )

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Peak]:
        """Ask for the server's status over and over while the block runs."""
        peak = Peak()

        async def watch() -> None:
            while True:
                status = await self.status()
                peak.pool_bytes = max(peak.pool_bytes, status.self_kv_bytes + status.cross_kv_bytes)
                peak.cross_bytes = max(peak.cross_bytes, status.cross_kv_bytes)
                await asyncio.sleep(_POLL_SECONDS)

        watcher = asyncio.create_task(watch())
        try:
            yield peak
        finally:
            watcher.cancel()
