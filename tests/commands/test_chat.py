"""A conversation in the terminal, against an engine that remembers what it was asked."""

from pathlib import Path

from typer.testing import CliRunner, Result

from tests.server.fakes import CHUNKS, DELTAS, STARTED, FakeRunner
from trimserve.api.prompt import ChatPrompt, ImageFile, Text
from trimserve.cli import app
from trimserve.client import Client
from trimserve.commands.chat import Conversation
from trimserve.errors import InvalidRequest, RequestFailed
from trimserve.v1 import generation_pb2 as pb


def chat(address: str, *lines: str, options: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(app, ["chat", "--address", address, *options], input="\n".join(lines))


def turns(runner: FakeRunner) -> list[list[tuple[str, list[object]]]]:
    """Roles and contents of the messages of each request."""
    asked = []
    for request in runner.requests:
        assert isinstance(request.prompt, ChatPrompt)
        asked.append([(message.role, [content(part) for part in message.parts]) for message in request.prompt.messages])
    return asked


def content(part: ImageFile | Text) -> object:
    return part.data if isinstance(part, ImageFile) else part.text


def test_what_was_said_and_shown_is_sent_again_with_the_next_question(
    runner: FakeRunner, address: str, tmp_path: Path
) -> None:
    (tmp_path / "a cat.png").write_bytes(b"cat")
    (tmp_path / "b.png").write_bytes(b"dog")
    show = f"/image {tmp_path}/a cat.png"
    done = chat(address, "Hi", "", show, "What is it?", "/again", "Anew", options=("--image", f"{tmp_path}/b.png"))
    assert done.exit_code == 0
    assert done.stdout == "Hello ☃!\n" * 3
    first = ("user", [b"dog", "Hi"])
    assert turns(runner) == [
        [first],
        [first, ("assistant", ["Hello ☃!"]), ("user", [b"cat", "What is it?"])],
        [("user", ["Anew"])],
    ]


def test_what_fails_is_told_in_a_line_and_forgotten(runner: FakeRunner, address: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"cat")
    runner.script = (RequestFailed("NaN"),)
    done = chat(address, "/image none.png", "/image", "/imgae x", f"/image {tmp_path}/a.png", "Hi", "Ho", "/quit", "No")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "error: none.png: No such file or directory",
        "error: /image: must be followed by the path of an image file",
        "/imgae is no command; /help lists them",
        "INTERNAL: NaN",
        "INTERNAL: NaN",
    ]
    assert turns(runner) == [[("user", [b"cat", "Hi"])], [("user", ["Ho"])]]


def test_a_refused_image_is_called_by_its_file(runner: FakeRunner, address: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"cat")
    runner.script = (InvalidRequest("chat.messages[0].parts[0].image", "must be an image file"),)
    assert f"error: {tmp_path}/a.png: must be an image file\n" in chat(address, f"/image {tmp_path}/a.png", "Hi").stderr


def test_commands_are_listed(address: str) -> None:
    assert "/image PATH" in chat(address, "/help").stdout


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(runner: FakeRunner, address: str) -> None:
    def stop(text: str) -> None:
        if text:
            raise KeyboardInterrupt

    with Client(address) as client:
        conversation = Conversation(client, None, pb.SamplingParams(), pb.TrimOptions())
        runner.script = (STARTED, *DELTAS)
        conversation.say("Hi", stop)
        runner.script = CHUNKS
        conversation.say("Go on", lambda _: None)
    assert turns(runner)[1][1] == ("assistant", ["Hel"])
