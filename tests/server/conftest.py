"""A server around a fake runner on a real loopback port, and a channel to it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from google.rpc import status_pb2

from tests.server.fakes import CONFIG, FakeRunner
from trimserve.server.app import Server, running_server
from trimserve.v1 import generation_pb2_grpc, model_pb2_grpc


@dataclass
class Loopback:
    """Both ends of a connection."""

    runner: FakeRunner
    server: Server
    channel: grpc.aio.Channel

    @property
    def generation(self) -> "generation_pb2_grpc.GenerationServiceAsyncStub":
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def model(self) -> "model_pb2_grpc.ModelServiceAsyncStub":
        return model_pb2_grpc.ModelServiceStub(self.channel)


@pytest.fixture
async def loopback() -> AsyncIterator[Loopback]:
    runner = FakeRunner()
    options = [("grpc.max_send_message_length", 128 * 2**20)]
    async with (
        running_server(runner, CONFIG) as server,
        grpc.aio.insecure_channel(server.address, options) as channel,
    ):
        yield Loopback(runner, server, channel)


def rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The status with details that a failed call ended with."""
    return status_pb2.Status.FromString(error.trailing_metadata()["grpc-status-details-bin"])
