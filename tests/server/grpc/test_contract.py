"""The contract as a client sees it that knows nothing but an address: reflection, and answers."""

import socket
import time
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.engine.driving import make_runner
from tests.engine.fake_model import FakeModel
from tests.server.conftest import Loopback
from tests.server.fakes import CONFIG
from trimserve.client import Client, make_request
from trimserve.serve import in_process_server, make_server
from trimserve.server.grpc.services import SERVICES
from trimserve.server.running import InProcessServer
from trimserve.v1 import generation_pb2 as pb

HAS_A_MEANING_AT_ZERO = {
    "GenerateRequest": {"priority", "num_choices"},
    "SamplingParams": {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "num_top_logprobs"},
    "TrimOptions": {"k_ratio", "max_kept_fraction", "merge_ratio"},
}


async def described(channel: grpc.aio.Channel, service: str) -> descriptor_pb2.FileDescriptorProto:
    """The file of a service, as reflection tells it."""
    make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
    answer = await make_stub(channel).ServerReflectionInfo(iter([question])).read()
    files = answer.file_descriptor_response.file_descriptor_proto
    parsed = (descriptor_pb2.FileDescriptorProto.FromString(file) for file in files)
    return next(file for file in parsed if service.rpartition(".")[2] in {each.name for each in file.service})


@pytest.mark.parametrize("service", SERVICES)
async def test_the_contract_is_versioned_and_has_a_place_in_every_language(loopback: Loopback, service: str) -> None:
    file = await described(loopback.channel, service)
    assert file.package == "trimserve.v1"
    assert file.name.startswith("trimserve/v1/")
    assert file.options.go_package
    assert file.options.java_package
    assert file.options.csharp_namespace
    [own] = file.service
    assert file.package + "." + own.name == service


@pytest.mark.parametrize("service", SERVICES)
async def test_enums_begin_unspecified_and_scalars_whose_zero_means_something_are_optional(
    loopback: Loopback, service: str
) -> None:
    file = await described(loopback.channel, service)
    for enum in file.enum_type:
        assert enum.value[0].number == 0
        assert enum.value[0].name.endswith("_UNSPECIFIED")
    for message in file.message_type:
        optional = {field.name for field in message.field if field.proto3_optional}
        assert optional >= HAS_A_MEANING_AT_ZERO.get(message.name, set())


def test_a_character_is_never_cut_between_two_messages() -> None:
    reply = "snow ☃ and 😀"  # the fake model's tokens are single bytes
    model = FakeModel({"hi": reply}, before_decode=lambda: time.sleep(0.03))  # or they all go at once
    runner = make_runner(lambda: model, max_batch=1, max_queue=1, num_preprocess_workers=1)
    with InProcessServer(make_server(runner, CONFIG)) as server, Client(server.address) as client:
        request = pb.GenerateRequest(raw_prompt="hi", sampling=pb.SamplingParams(temperature=0))
        texts = [event.delta.text for event in client.stream(request) if event.WhichOneof("event") == "delta"]
        assert "".join(texts) == client.generate(request).text == reply
        assert len(texts) > 2


def test_nothing_is_fetched_for_an_image_that_is_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, in_process_server() as server:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/image.png"
        with Client(server.address) as client, pytest.raises(grpc.RpcError) as caught:
            client.generate(make_request("What is this?", [address.encode()]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()
