"""A trimserve server in a process of its own, asked over gRPC."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import grpc

from benchmarks.load import Answer, Item
from trimserve.client import channel_options, make_request
from trimserve.process import ServerProcess, server_process
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["GrpcTarget", "Stream", "running_server"]

Stream = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse]


def running_server(
    model: Path | None, *, num_threads: int, flags: Sequence[object] = ()
) -> AbstractContextManager[ServerProcess]:
    """A server of a checkpoint or of the embedded model, until the block ends; it logs only what is wrong."""
    checkpoint = () if model is None else ("--model", model)
    return server_process(*map(str, ("--num-threads", num_threads, "--log-level", "warning", *flags, *checkpoint)))


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
        self.max_new_tokens, self._trim = max_new_tokens, trim

    async def __aenter__(self) -> "GrpcTarget":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ask(self, item: Item) -> Answer:
        """See `load.Ask`."""
        arrivals: list[float] = []
        token_ids: list[int] = []
        try:
            async for event in self.stream(item):
                if event.delta.token_ids:
                    arrivals.append(time.monotonic())
                    token_ids += event.delta.token_ids
        except grpc.RpcError as error:
            return Answer(error=f"{error.code().name}: {error.details()}")
        return Answer(tuple(arrivals), len(token_ids), tuple(token_ids))

    def stream(self, item: Item, more_tokens: int = 0) -> Stream:
        """The events of an answer that may have more tokens."""
        tokens = self.max_new_tokens + more_tokens
        sampling = pb.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=0)
        return self._generation.GenerateStream(
            make_request(item.question, item.images, sampling=sampling, trim=self._trim)
        )

    async def status(self) -> model_pb2.GetServerStatusResponse:
        """The server's account now."""
        return await self._model.GetServerStatus(model_pb2.GetServerStatusRequest())
