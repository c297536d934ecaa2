"""Fields counted on the wire: what protobuf would parse passes up to the bounds, whatever it says."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.server.grpc.test_random_requests import messages
from trimserve.errors import InvalidRequest
from trimserve.server.grpc.census import MAX_FIELDS, MAX_PACKED_BYTES, check_fields
from trimserve.v1 import generation_pb2 as pb

REQUEST = pb.GenerateRequest
TEXT = pb.Part(text="a")
START_OF_GROUP = 3


def chat_of(num_messages: int) -> bytes:
    """A request with so many messages of one part: four fields each, and one around all."""
    message = pb.Message(role=pb.ROLE_USER, parts=[TEXT])
    return pb.GenerateRequest(chat=pb.Chat(messages=[message] * num_messages)).SerializeToString()


@given(messages(pb.GenerateRequest))
def test_every_message_that_protobuf_writes_passes(message: pb.GenerateRequest) -> None:
    check_fields(message.SerializeToString(), REQUEST)


@given(st.binary(max_size=60))
def test_what_protobuf_parses_passes_but_for_groups(data: bytes) -> None:
    try:
        pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    try:
        check_fields(data, REQUEST)
    except InvalidRequest:
        assert any(byte & 7 == START_OF_GROUP for byte in data)


def test_fields_of_all_levels_count_together() -> None:
    check_fields(chat_of((MAX_FIELDS - 1) // 4), REQUEST)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_FIELDS} fields in all, got more"):
        check_fields(chat_of((MAX_FIELDS - 1) // 4 + 1), REQUEST)


def test_the_largest_valid_chat_passes() -> None:
    check_fields(chat_of(4096), REQUEST)


def test_the_content_of_text_and_files_does_not_count() -> None:
    image = pb.Image(data=b"\x0a\x00" * MAX_FIELDS)
    check_fields(pb.GenerateRequest(raw_prompt="\n\0" * MAX_FIELDS, images=[image]).SerializeToString(), REQUEST)


@pytest.mark.parametrize(("more", "passes"), [(0, True), (1, False)])
def test_packed_numbers_count_by_their_bytes(more: int, passes: bool) -> None:
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(token_ids=[1] * (MAX_PACKED_BYTES + more)))
    if passes:
        check_fields(request.SerializeToString(), REQUEST)
        return
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PACKED_BYTES} bytes of numbers in a field"):
        check_fields(request.SerializeToString(), REQUEST)


@pytest.mark.parametrize(
    "data",
    [b"\x0b\x0c", b"\x0a", b"\x0a\x05ab", b"\x08\xff", b"\x09\x00", b"\x0d\x00", b"\x08" + b"\xff" * 11, b"\x0e"],
    ids=["group", "no length", "cut", "cut number", "cut 8 bytes", "cut 4 bytes", "endless number", "no type"],
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="bytes that are none"):
        check_fields(data, REQUEST)
