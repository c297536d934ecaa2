"""Random requests to a server of the embedded model: answered or refused, never a defect, never a crash."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from trimserve.client import make_request
from trimserve.model.loading import embedded_model_folder
from trimserve.serve import in_process_server
from trimserve.v1 import generation_pb2 as pb

PICTURE = (embedded_model_folder().parent / "samples/scene.png").read_bytes()

GENERATE = "/trimserve.v1.GenerationService/Generate"

MAX_NEW_TOKENS = 3

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,  # an adapter
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["<|image|>", "<|eot_id|>x", "trimmed", "mine"]))
PICTURES = st.one_of(st.binary(max_size=40), st.just(PICTURE), st.integers(0, 400).map(lambda size: PICTURE[:size]))
SMALL = st.integers(0, 40)

SCALARS = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.one_of(st.floats(0.01, 1), st.floats(0.01, 1), st.floats()),
    FieldDescriptor.CPPTYPE_INT32: st.one_of(SMALL, st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(SMALL, st.integers(0, 2**32 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 4),
}


def values(field: Any) -> st.SearchStrategy[object]:
    """What a field may hold, sensible or not."""
    if field.message_type is not None:
        return messages(GetMessageClass(field.message_type))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return PICTURES
    return TEXTS if field.type == FieldDescriptor.TYPE_STRING else SCALARS[field.cpp_type]


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """Any message of a type: each field set or not, at most two of a list."""
    message = kind()
    fields: Any = kind.DESCRIPTOR.fields
    for field in fields:
        if draw(st.integers(0, 2)):  # two of three stay unset
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(SMALL, SCALARS[FieldDescriptor.CPPTYPE_DOUBLE])))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field), max_size=2)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Any request; every other one with a sound prompt, so that its options come to be looked at."""
    request = draw(messages(pb.GenerateRequest))
    assert isinstance(request, pb.GenerateRequest)
    if draw(st.booleans()):
        images = [PICTURE] * draw(st.integers(0, 2))
        request.ClearField("images")
        request.request_id = ""
        request.chat.CopyFrom(make_request(draw(TEXTS), images).chat)
    if not request.sampling.HasField("max_new_tokens"):
        request.sampling.max_new_tokens = MAX_NEW_TOKENS
    return request


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """To a server of the embedded model."""
    with in_process_server() as server, grpc.insecure_channel(server.address) as channel:
        yield channel


def ask(channel: grpc.Channel, data: bytes) -> grpc.StatusCode:
    """How a call of these bytes ends."""
    generate: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GENERATE)
    try:
        generate(data, timeout=120)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@settings(max_examples=150)
@given(request=requests())
def test_a_random_request_is_answered_or_refused(channel: grpc.Channel, request: pb.GenerateRequest) -> None:
    assert ask(channel, request.SerializeToString()) in EXPECTED


@settings(max_examples=150)
@given(request=requests(), place=st.floats(0, 1), garbage=st.binary(max_size=8))
def test_a_damaged_request_is_answered_or_refused(
    channel: grpc.Channel, request: pb.GenerateRequest, place: float, garbage: bytes
) -> None:
    data = request.SerializeToString()
    at = round(place * len(data))
    assert ask(channel, data[:at] + garbage + data[at + len(garbage) :]) in EXPECTED


def test_the_server_still_answers(channel: grpc.Channel) -> None:
    request = make_request("Hello", sampling=pb.SamplingParams(max_new_tokens=1))
    assert ask(channel, request.SerializeToString()) is grpc.StatusCode.OK
