"""A server around a fake runner on a real loopback port, a channel to it, and what the protos say of a request."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.rpc import status_pb2

from scripts.generate.docs import comments, descriptors
from tests.server.fakes import CONFIG, FakeRunner
from trimserve.serve import make_server
from trimserve.server.lifecycle import Server
from trimserve.server.running import running_server
from trimserve.v1 import adapter_pb2_grpc, generation_pb2_grpc, model_pb2_grpc


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
    def adapters(self) -> "adapter_pb2_grpc.AdapterServiceAsyncStub":
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def model(self) -> "model_pb2_grpc.ModelServiceAsyncStub":
        return model_pb2_grpc.ModelServiceStub(self.channel)


@pytest.fixture
async def loopback() -> AsyncIterator[Loopback]:
    runner = FakeRunner()
    options = [("grpc.max_send_message_length", 128 * 2**20)]
    async with (
        running_server(make_server(runner, CONFIG)) as server,
        grpc.aio.insecure_channel(server.address, options) as channel,
    ):
        yield Loopback(runner, server, channel)


def rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The status with details that a failed call ended with."""
    return status_pb2.Status.FromString(error.trailing_metadata()["grpc-status-details-bin"])


REQUEST_MESSAGES = (
    "GenerateRequest",
    "Chat",
    "Message",
    "Part",
    "Image",
    "TokenIds",
    "SamplingParams",
    "TrimOptions",
    "Budget",
    "PolicyParameters",
    "LookAgain",
)

Field = tuple[FieldDescriptorProto, str]
"""A field of a proto and its comment."""


@pytest.fixture(scope="module")
def said() -> dict[str, Field]:
    """Every field of a request, by its path, or its message's name where it has no path of its own."""
    (file,) = (file for file in descriptors() if file.name.endswith("generation.proto"))
    text = comments(file)
    owners = {"GenerateRequest": "", "SamplingParams": "sampling.", "TrimOptions": "trim.", "Budget": "trim.budget."}
    owners |= {"LookAgain": "trim.look_again."}
    return {
        owners.get(message.name, f"{message.name}.") + field.name: (field, text[4, index, 2, place])
        for index, message in enumerate(file.message_type)
        if message.name in REQUEST_MESSAGES
        for place, field in enumerate(message.field)
    }
