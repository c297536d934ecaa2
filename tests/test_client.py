"""The client: requests made from strings and files, and calls over a real connection."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.fakes import CHUNKS, CONFIG, FakeRunner, Script, ScriptItem
from tests.server.test_access import entry
from tests.server.test_tls import Files, server_config
from trimserve.api.constraint import Choice, JsonObject, JsonSchema, LarkGrammar, Regex
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.client import SERVICE_CONFIG, Client, Tls, image_hash, make_image, make_request
from trimserve.config import EngineConfig
from trimserve.errors import EngineBusy, EngineStopped, RequestFailed
from trimserve.serve import make_server
from trimserve.server.grpc.services import GRANTED_BY_NAME, SERVICES
from trimserve.server.running import InProcessServer
from trimserve.v1 import generation_pb2 as pb


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def client(runner: FakeRunner) -> Iterator[Client]:
    config = CONFIG.model_copy(update={"engine": EngineConfig()})
    with InProcessServer(make_server(runner, config)) as server, Client(server.address) as client:
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
    images = (ImageFile(b"file"), ImageFile(b"file"), ImageFile(b"bytes"))
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
    events = list(client.stream(messages, trim=trim, request_id="mine", priority=3, num_choices=2))
    assert "".join(event.delta.text for event in events) == "Hello ☃!"
    (request,) = runner.requests
    assert isinstance(request.prompt, ChatPrompt)
    assert [message.role for message in request.prompt.messages] == ["user", "assistant", "user"]
    assert (request.request_id, request.priority, request.trim.k_ratio) == ("mine", 3, 0.5)
    assert request.num_choices == 2


def test_a_request_is_routed_by_its_first_image() -> None:
    first, other = b"first", b"other"
    conversation = [pb.Message(parts=[pb.Part(text="a"), pb.Part(image=make_image(first))]), pb.Message()]
    digests = {
        image_hash(request)
        for request in (
            make_request("?", [first]),
            make_request("else?", [first, other]),
            make_request(conversation),
            pb.GenerateRequest(raw_prompt="<|image|>", images=[make_image(first)]),
        )
    }
    assert digests == {hashlib.sha256(first).hexdigest()[:32]}
    assert image_hash(make_request("?", [other])) not in digests
    assert image_hash(make_request("?")) is None


def test_calls_carry_the_digest_of_their_image() -> None:
    seen: list[dict[str, Any]] = []

    class Sees(grpc.ServerInterceptor):
        def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            if "Generation" in handler_call_details.method:  # health is watched, too
                seen.append(dict(handler_call_details.invocation_metadata))
            return continuation(handler_call_details)

    server = grpc.server(ThreadPoolExecutor(1), interceptors=[Sees()])  # it has no services
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}", token="secret") as client:
        for images in [b"image"], []:
            for call in (client.generate, lambda *asked: list(client.stream(*asked))):
                with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                    call("?", images)
    server.stop(None)
    digest = image_hash(make_request("?", [b"image"]))
    assert [call.get("x-image-hash") for call in seen] == [digest, digest, None, None]
    assert {call["authorization"] for call in seen} == {"Bearer secret"}


def test_an_answer_can_be_asked_for_in_a_form(client: Client, runner: FakeRunner) -> None:
    client.generate("Hi", json_schema={"type": "object"})
    client.generate("Hi", json_schema='{"type": "array"}')
    client.generate("Hi", json_object=True)
    client.generate("Hi", regex="a+")
    client.generate("Hi", choice=["yes", "no"])
    client.generate("Hi", grammar='start: "a"')
    assert [request.constraint for request in runner.requests] == [
        JsonSchema('{"type": "object"}'),
        JsonSchema('{"type": "array"}'),
        JsonObject(),
        Regex("a+"),
        Choice(("yes", "no")),
        LarkGrammar('start: "a"'),
    ]
    with pytest.raises(ValueError, match="regex and choice: an answer can have one constraint only"):
        client.generate("Hi", regex="a+", choice=["yes"])


def test_adapters_are_loaded_listed_asked_and_unloaded(client: Client, runner: FakeRunner) -> None:
    loaded = client.load_adapter("mine", Path("/adapters/mine"))
    assert (loaded.name, loaded.folder, loaded.num_bytes) == ("mine", "/adapters/mine", 333)
    assert [adapter.name for adapter in client.adapters()] == ["mine"]
    client.generate("Hi", adapter="mine")
    client.generate("Hi")
    assert [request.adapter for request in runner.requests] == ["mine", None]
    client.unload_adapter("mine")
    assert client.adapters() == []


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
    runner.script = [*CHUNKS[:2], *CHUNKS[1:2] * 100_000]
    stream = client.stream("Hello")
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    deadline = 200
    while not runner.cancelled.is_set() and deadline:
        client.status()
        deadline -= 1
    assert runner.cancelled.is_set()


def test_model_and_status_are_told(client: Client) -> None:
    assert client.model().model_id == "fake"
    assert client.status().is_ready


class FailsAtFirst:
    """A script that ends with an error the first times that it is played."""

    def __init__(self, error: Exception, num_failures: int, before: Script = ()) -> None:
        """Play `before`, then the error."""
        self.num_plays = 0
        self._num_failures = num_failures
        self._failing = (*before, error)

    def __iter__(self) -> Iterator[ScriptItem]:
        self.num_plays += 1
        return iter(self._failing if self.num_plays <= self._num_failures else CHUNKS)


def test_an_unavailable_server_is_tried_again(client: Client, runner: FakeRunner) -> None:
    answers: list[Callable[[], str]] = [
        lambda: client.generate("Hello").text,
        lambda: "".join(event.delta.text for event in client.stream("Hello")),
    ]
    for answer in answers:
        runner.script = script = FailsAtFirst(EngineStopped("draining"), 2)
        assert answer() == "Hello ☃!"
        assert script.num_plays == 3


def test_a_large_request_is_tried_again_too(client: Client, runner: FakeRunner) -> None:
    runner.script = FailsAtFirst(EngineStopped("draining"), 1)
    assert client.generate("What?", [bytes(20 * 2**20)]).text


@pytest.mark.parametrize(
    ("error", "before"),
    [(EngineBusy("full"), ()), (RequestFailed("NaN"), ()), (EngineStopped("cut"), CHUNKS[:1])],
    ids=["busy", "failed", "after its first message"],
)
def test_nothing_else_is_tried_again(client: Client, runner: FakeRunner, error: Exception, before: Script) -> None:
    runner.script = script = FailsAtFirst(error, 1, before)
    with pytest.raises(grpc.RpcError):
        list(client.stream("Hello"))
    assert script.num_plays == 1


def test_calls_go_to_every_server_of_a_name_that_is_healthy() -> None:
    runners = FakeRunner(), FakeRunner()
    with (
        InProcessServer(make_server(runners[0], CONFIG)) as first,
        InProcessServer(make_server(runners[1], CONFIG)) as second,
        Client(f"ipv4:{first.address},{second.address}") as client,
    ):
        while not all(runner.requests for runner in runners):
            client.generate("Hello")
        runners[0].is_ready = False
        for _ in range(200):  # also before health has told
            assert client.generate("Hello").text


def test_a_client_shows_its_certificate_and_its_token(runner: FakeRunner, tmp_path: Path) -> None:
    files = Files(tmp_path)
    own = files.authority.issue_cert("a-client")
    chain, key, clients = tmp_path / "own.pem", tmp_path / "own.key", tmp_path / "clients.toml"
    own.cert_chain_pems[0].write_to_path(chain)
    own.private_key_pem.write_to_path(key)
    clients.write_text(entry("us", "secret"))
    config = server_config(files, is_mutual=True)
    server = config.server.model_copy(update={"auth_file": clients})
    tls = Tls(ca=files.path("clients.pem"), certificate=chain, key=key)
    with InProcessServer(make_server(runner, config.model_copy(update={"server": server}))) as running:
        with Client(running.address, tls=tls, token="secret") as client:
            assert client.generate("Hello").text
            assert list(client.stream("Hello"))
            assert client.model().model_id == "fake"
            assert client.status().is_ready
        with Client(running.address, tls=tls, token="other") as client, pytest.raises(grpc.RpcError) as caught:
            client.generate("Hello")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_service_config_names_real_services_and_retries_only_what_no_server_has_begun() -> None:
    document = json.loads(SERVICE_CONFIG.read_text())
    named = {entry["service"] for method in document["methodConfig"] for entry in method["name"]}
    assert named == set(SERVICES)
    assert document["healthCheckConfig"]["serviceName"] in SERVICES
    for method in document["methodConfig"]:
        if {"service": GRANTED_BY_NAME[0]} in method["name"]:
            assert "retryPolicy" not in method  # who loads an adapter twice is told that it exists
        else:
            assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
