"""What is copied from the page is the request, run by Python and by a shell."""

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import trimserve.client
from tests.server.fakes import CONFIG, INFO, converted
from trimserve.client import Tls, make_request
from trimserve.connection import Connection
from trimserve.playground.setting import OFF, Question, Setting
from trimserve.playground.snippets import as_curl, as_python
from trimserve.server.grpc.responses import model_response
from trimserve.server.http.convert import convert
from trimserve.server.http.schema import parse
from trimserve.v1 import generation_pb2 as pb

MODEL = model_response(INFO, CONFIG.engine)
PLAIN = Connection("host:1")
IMAGE = b"an image"
NAME = "it's a photo.png"
TEXT = """Is it "IMAGE HERE"? 'No' $HOME \\n {%s} `ls`
☃"""

REQUESTS = [
    (Question(TEXT, image, 7, 0.5).request(setting, MODEL), name)
    for image, name in ((IMAGE, NAME), (None, None))
    for setting in (Setting("trimmed", 0.3, 0.1), Setting("cls", 0.25, 0), Setting(OFF, 1, 0))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the image, as the working directory."""
    (tmp_path / NAME).write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Remembering:
    """In place of the client."""

    made: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012  # emptied by whoever uses it
    asked: list[pb.GenerateRequest] = []  # noqa: RUF012  # the same

    def __init__(self, address: str, **options: Any) -> None:
        """Remember how."""
        self.made.append((address, options))

    def __enter__(self) -> "Remembering":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def stream(self, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
        self.asked.append(request)
        return [pb.GenerateStreamResponse(delta=pb.TokenDelta(text="Hello"))]


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    """What a program asks."""
    Remembering.made.clear()
    Remembering.asked.clear()
    monkeypatch.setattr(trimserve.client, "Client", Remembering)
    return Remembering


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("request_", "name"), REQUESTS)
def test_the_program_asks_the_same(
    request_: pb.GenerateRequest, name: str | None, remembering: type[Remembering], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(as_python(request_, PLAIN, name), {})
    assert remembering.asked == [request_]
    assert remembering.made == [("host:1", {})]
    assert capsys.readouterr().out == "Hello\n"


def test_the_program_knows_certificates_but_not_the_token(
    remembering: type[Remembering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMSERVE_TOKEN", "mine")
    connection = Connection("host:1", Tls(ca=Path("ca's.pem")), "secret")
    program = as_python(make_request("?"), connection, None)
    exec(program, {})
    assert remembering.made == [("host:1", {"tls": Tls(ca=Path("ca's.pem")), "token": "mine"})]
    assert "secret" not in program


@pytest.mark.parametrize(("request_", "name"), REQUESTS)
def test_the_line_for_a_shell_asks_the_same_over_http(
    request_: pb.GenerateRequest, name: str | None, folder: Path
) -> None:
    line = as_curl(request_, INFO.model_id, PLAIN, "host:2", name)
    before, _, curl = line.rpartition("| ") if name else line.rpartition("|\n  ")
    assert curl == "curl --silent --show-error --no-buffer --json @- http://host:2/v1/chat/completions\n"
    body = subprocess.run(["bash", "-c", before], cwd=folder, capture_output=True, check=True).stdout
    wanted = converted(request_)
    asked = convert(parse(body), wanted.request_id, (), INFO, CONFIG.engine)
    assert asked == wanted


def test_the_line_for_a_shell_knows_certificates_but_not_the_token() -> None:
    connection = Connection("host:1", Tls(Path("ca.pem"), Path("me.pem"), Path("me.key")), "secret")
    line = as_curl(make_request("?"), "fake", connection, "host:2", None)
    assert "--cacert ca.pem --cert me.pem --key me.key https://host:2/" in line
    assert '"Authorization: Bearer $TRIMSERVE_TOKEN"' in line
    assert "secret" not in line
