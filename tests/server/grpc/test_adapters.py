"""Adapters over the wire."""

import grpc
import pytest

from tests.server.conftest import Loopback
from tests.server.fakes import chat_request
from tests.server.grpc.test_interceptors import failed
from trimserve.errors import AdapterError, AdapterExists, OutOfMemory, UnknownAdapter
from trimserve.v1 import adapter_pb2 as pb


async def test_what_is_loaded_is_listed_with_every_field_until_it_is_unloaded(loopback: Loopback) -> None:
    answer = await loopback.adapters.LoadAdapter(pb.LoadAdapterRequest(name="mine", folder="/some/folder"))
    assert answer.adapter.name == "mine"
    [listed] = (await loopback.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert listed == pb.Adapter(
        name="mine",
        folder="/some/folder",
        num_bytes=333,
        rank=8,
        modules=["lm_head"],
        changes_image_features=True,
        num_requests=2,
    )
    await loopback.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="mine"))
    assert not (await loopback.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterError("adapter_model.safetensors: x: has NaN"), "FAILED_PRECONDITION"),
        (AdapterExists("it is loaded"), "ALREADY_EXISTS"),
        (OutOfMemory("adapter 'mine' takes up to 9 bytes, 8 are free"), "RESOURCE_EXHAUSTED"),
    ],
)
async def test_an_adapter_that_cannot_be_loaded_is_refused_and_the_next_request_answered(
    loopback: Loopback, error: Exception, code: str
) -> None:
    loopback.runner.adapter_error = error
    refused, _ = await failed(loopback.adapters.LoadAdapter(pb.LoadAdapterRequest(name="mine", folder="/x")))
    assert refused.name == code
    assert (await loopback.generation.Generate(chat_request())).text


async def test_unloading_what_is_not_loaded_is_not_found(loopback: Loopback) -> None:
    loopback.runner.adapter_error = UnknownAdapter("adapter 'mine' is not loaded")
    code, info = await failed(loopback.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="mine")))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.LoadAdapterRequest(name="", folder="/x"), "name: must be 1 to 64"),
        (pb.LoadAdapterRequest(name="a/b", folder="/x"), "name: must be 1 to 64 of A-Z a-z 0-9 . _ and -, got 3"),
        (pb.LoadAdapterRequest(name="mine"), "folder: must be a path, got ''"),
        (pb.LoadAdapterRequest(name="mine", folder="a\0b"), "folder: must be a path"),
    ],
)
async def test_names_and_folders_are_checked(loopback: Loopback, request_: pb.LoadAdapterRequest, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT") as caught:
        await loopback.adapters.LoadAdapter(request_)
    assert (caught.value.details() or "").startswith(field)


async def test_a_request_names_its_adapter(loopback: Loopback) -> None:
    request = chat_request()
    request.adapter = "mine"
    await loopback.generation.Generate(request)
    assert loopback.runner.requests[0].adapter == "mine"
    request.adapter = "x" * 65
    code, info = await failed(loopback.generation.Generate(request))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
