"""The client: requests made from strings and files, and calls over a real connection."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.server.fakes import CONFIG, FakeRunner
from trimserve.client import Client, make_request
from trimserve.config import EngineConfig
from trimserve.models.prompt import ChatPrompt, Image, Message, Text
from trimserve.server.app import InProcessServer
from trimserve.v1 import generation_pb2 as pb


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def client(runner: FakeRunner) -> Iterator[Client]:
    config = CONFIG.model_copy(update={"engine": EngineConfig()})
    with InProcessServer(runner, config) as server, Client(server.address) as client:
        yield client


def test_a_question_about_image_files_arrives_as_one_user_message(
    client: Client, runner: FakeRunner, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"file")
    options = pb.SamplingParams(max_new_tokens=5)
    answer = client.generate("What?", [path, str(path), b"bytes"], system="Be brief.", sampling=options)
    assert answer.text == "Hello ☃!"
    (request,) = runner.requests
    images = (Image(b"file"), Image(b"file"), Image(b"bytes"))
    assert request.prompt == ChatPrompt(
        (Message("system", (Text("Be brief."),)), Message("user", (*images, Text("What?"))))
    )
    assert request.sampling.max_new_tokens == 5


def test_a_conversation_and_options_arrive_unchanged(client: Client, runner: FakeRunner) -> None:
    messages = [
        pb.Message(role=role, parts=[pb.Part(text=text)])
        for role, text in ((pb.ROLE_USER, "a"), (pb.ROLE_ASSISTANT, "b"), (pb.ROLE_USER, "c"))
    ]
    trim = pb.TrimOptions(k_ratio=0.5)
    events = list(client.stream(messages, trim=trim, request_id="mine", priority=3))
    assert "".join(event.delta.text for event in events) == "Hello ☃!"
    (request,) = runner.requests
    assert isinstance(request.prompt, ChatPrompt)
    assert [message.role for message in request.prompt.messages] == ["user", "assistant", "user"]
    assert (request.request_id, request.priority, request.trim.k_ratio) == ("mine", 3, 0.5)


def test_a_whole_request_is_sent_as_it_is(client: Client, runner: FakeRunner) -> None:
    client.generate(pb.GenerateRequest(raw_prompt="Hi", request_id="mine"))
    assert runner.requests[0].request_id == "mine"


def test_a_message_beyond_grpcs_own_limit_is_sent(client: Client) -> None:
    assert client.generate("What?", [bytes(5 * 2**20)]).text


def test_nothing_may_stand_beside_what_already_has_it() -> None:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="a")])
    with pytest.raises(ValueError, match="must be parts of the messages"):
        make_request([message], [b"image"])
    with pytest.raises(ValueError, match="must be part of the request"):
        Client("127.0.0.1:1").generate(pb.GenerateRequest(), request_id="mine")


def test_a_status_is_raised_untouched(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.generate("What?", trim=pb.TrimOptions(k_ratio=2))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_leaving_a_stream_cancels_the_request(client: Client, runner: FakeRunner) -> None:
    runner.script = [*runner.script[:2], *[runner.script[1]] * 100_000]
    stream = client.stream("Hello")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = 200
    while not runner.cancelled.is_set() and deadline:
        client.status()
        deadline -= 1
    assert runner.cancelled.is_set()


def test_model_and_status_are_told(client: Client) -> None:
    assert client.model().model_id == "fake"
    assert client.status().is_ready
