"""What a user can mend is one line that names it, with status 1, or 2 where the command was typed wrongly."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.server.fakes import CONFIG, FakeRunner
from tests.server.test_access import entry
from trimserve.cli import main
from trimserve.serve import in_process_server, make_server
from trimserve.server import logs
from trimserve.server.queued_log import QueuedHandler
from trimserve.server.running import InProcessServer


class Served(NamedTuple):
    """Addresses of servers."""

    real: str
    """Of the embedded model."""
    guarded: str
    """Wants a token."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    clients = tmp_path_factory.mktemp("clients") / "clients.toml"
    clients.write_text(entry("us", "secret"))
    guarded = CONFIG.model_copy(update={"server": CONFIG.server.model_copy(update={"auth_file": clients})})
    with in_process_server() as real, InProcessServer(make_server(FakeRunner(), guarded)) as fake:
        yield Served(real.address, fake.address)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: a text, bytes that are no text, a folder, and a question about a missing image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "configure_logging", lambda *_: QueuedHandler(io.StringIO(), lambda _: None))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text").write_text("{\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "questions").write_text('{"image": "no.png", "question": "?", "answer": "!"}\n')
    return tmp_path


ASK = ["generate", "--prompt", "x"]
HERE = ["--address", "REAL"]
NOWHERE = ["--address", "127.0.0.1:1"]
EVAL = ["eval", "--out", "out", *HERE, "--data"]

STATUS_1 = {
    "a file that is missing": [
        ([*ASK, "--image", "no/such.png"], "no/such.png: No such file or directory"),
        (["chat", "--image", "no.png", *NOWHERE], "no.png: No such file or directory"),
        (["batch", "no.jsonl", "out"], "no.jsonl: No such file or directory"),
        ([*EVAL, "no.jsonl"], "no.jsonl: cannot be read"),
        ([*EVAL, "questions"], "questions:1: image: no such file: no.png"),
        ([*ASK, *HERE, "--ca", "no.pem"], "no.pem: No such file or directory"),
        (["serve", "--codebook", "no"], "codebook no: cannot be read"),
        (["serve", "--auth-file", "no"], "no (--auth-file) must be TOML with clients"),
    ],
    "a file of another kind": [
        ([*ASK, *HERE, "--image", "text"], "text: must be an image file"),
        (["explain", *ASK[1:], "--image", "text"], "text: must be an image file"),
        ([*ASK, "--image", "https://a.org/b.png"], "https://a.org/b.png: is a URL"),
        ([*ASK, "--image", "folder"], "folder: Is a directory"),
        ([*ASK, *HERE, "--ca", "folder"], "folder: Is a directory"),
        (["batch", "folder", "out"], "folder: Is a directory"),
        (["batch", "questions", "folder", *NOWHERE], "folder: must be a regular file"),
        ([*EVAL, "text"], "text:1: Invalid JSON"),
    ],
    "a model that is none": [
        ([*ASK, "--model", "no/such/model"], "no/such/model: no such folder"),
        ([*ASK, "--model", "[/red]" + "no" * 100], "[/red]" + "no" * 100),
        (["info", "--model", "folder"], "folder: no config.json"),
        (["plan", "--memory", "1GiB", "--model", "folder"], "folder: no config.json"),
    ],
    "a value that the server refuses": [
        ([*ASK, *HERE, "--k-ratio", "2"], "trim.k_ratio: must be in (0, 1], got 2.0"),
        ([*ASK, *HERE, "--policy", "best"], "trim.policy: must be one of trimmed, random, "),
        ([*ASK, *HERE, "--merge-ratio", "-1"], "trim.merge_ratio: must be in [0, 1], got -1.0"),
        ([*ASK, *HERE, "--temperature", "nan"], "sampling.temperature: must be "),
        ([*ASK, *HERE, "--regex", "("], "regex: cannot be followed: "),
        ([*ASK, *HERE, "--json-schema", "text"], "json_schema: cannot be followed: "),
        ([*ASK, *HERE, "--adapter", "no"], "NOT_FOUND: "),
    ],
    "a server that is not there": [
        ([*ASK, *NOWHERE], "cannot reach 127.0.0.1:1 (HOST:PORT expected): "),
        (["status", *NOWHERE], "cannot reach 127.0.0.1:1 (HOST:PORT expected): "),
        (["info", *NOWHERE], "cannot reach 127.0.0.1:1 (HOST:PORT expected): "),
        ([*ASK, "--address", "http://a.invalid"], "cannot reach http://a.invalid (HOST:PORT expected): "),
        ([*ASK, *HERE, "--tls"], "(HOST:PORT expected): "),
    ],
    "a token that is missing or wrong": [
        (["status", "--address", "GUARDED"], "UNAUTHENTICATED: "),
        ([*ASK, "--address", "GUARDED", "--token", "wrong"], "UNAUTHENTICATED: "),
        (["info", "--address", "GUARDED", "--token", "wrong"], "UNAUTHENTICATED: "),
    ],
}

STATUS_2 = {
    "a value of another type or out of range": [
        (["serve", "--max-batch", "0"], "--max-batch: Input should be greater than or equal to 1, got 0"),
        (["serve", "--adapter", "x"], "--adapter: String should match pattern"),
        (["serve", "--quantize", "int3"], "'--quantize': 'int3' is not one of 'none', 'int8', 'int4'"),
        ([*ASK, "--seed", "-1"], "'--seed'"),
        ([*ASK, "--max-new-tokens", "many"], "'--max-new-tokens'"),
        (["plan", "--memory", "much"], "--memory: must be a size such as 24GiB, got 'much'"),
        (["plan", "--memory", "1GiB", "--bandwidth", "nan"], "--bandwidth: must be above 0 and finite, got nan"),
        (["explain", *ASK[1:], "--image", "x", "--out", "x.pdf"], "must end in one of .png, .jpg, .jpeg, .webp"),
        ([*EVAL, "questions", "--k-ratios", "2"], "--k-ratios: must be numbers in (0, 1], got '2'"),
        ([*ASK, *HERE, "--json-schema", "bytes"], "--json-schema: bytes: not UTF-8"),
    ],
    "options that exclude or need each other": [
        (["serve", "--tls-cert", "x"], "--tls-key: must be given with tls_cert"),
        ([*ASK, "--prompt", "-", "--image", "-"], "standard input (-) can be read once only"),
        ([*ASK, "--no-trim", "--keep", "1"], "--no-trim and --keep exclude each other"),
        ([*ASK, "--no-trim", "--look-again", "1"], "--no-trim and --look-again exclude each other"),
        ([*ASK, "--tls"], "--tls needs --address beside it"),
        (["status", "--address", "a:1", "--client-key", "k"], "--client-cert and --client-key need each other"),
    ],
    "options that have no effect beside others": [
        ([*ASK, *HERE, "--model", "x"], "--address excludes --model, which would have no effect"),
        (["chat", *HERE, "--device", "auto"], "--address excludes --device, which would have no effect"),
        (["explain", *ASK[1:], "--image", "x", *HERE, "--dtype", "auto"], "--address excludes --dtype"),
        (["batch", "questions", "out", *HERE, "--max-batch", "4"], "--address excludes --max-batch"),
        (["playground", *HERE, "--quantize", "int8"], "--address excludes --quantize"),
        (["info", *HERE, "--kv-dtype", "int8"], "--address excludes --kv-dtype"),
        ([*EVAL, "questions", "--num-threads", "1"], "--address excludes --num-threads"),
        ([*ASK, "--token", "x"], "--token needs --address beside it"),
        ([*EVAL, "questions", "--keep", "0.5", "--k-ratios", "0.5"], "--keep excludes --k-ratios"),
        ([*EVAL, "questions", "--k-ratios", "0.5", "--calibrate"], "--calibrate excludes --k-ratios"),
        ([*EVAL, "questions", "--max-kl", "1"], "--max-kl needs --calibrate beside it"),
        ([*EVAL, "questions", "--calibrate", "--keep", "0.5", "--max-kl", "1"], "--keep excludes --max-kl"),
        ([*EVAL, "questions", "--calibrate", "--by", "kl"], "--by needs --keep beside it"),
        (["train-compressor", "--codebook", "x"], "No such option: --codebook"),
        (["codebook", "build", "--adapter", "a=x"], "No such option: --adapter"),
    ],
    "text that is not UTF-8": [
        (["generate", "--prompt", "a\udcff"], "'--prompt': must be UTF-8, got 'a\\udcff'"),
        ([*ASK, *HERE, "--choice", "a\udcff"], "must be UTF-8, got 'a\\udcff'"),
        ([*ASK, "--address", "a\udcff"], "must be UTF-8, got 'a\\udcff'"),
    ],
    "a name that is missing or unknown": [
        (["generate"], "Missing option '--prompt' (see trimserve generate --help)"),
        (["genrate"], "No such command 'genrate'"),
        (["status", "--adress", "a:1"], "No such option: --adress"),
    ],
}


@pytest.mark.usefixtures("folder")
def test_knobs_in_the_environment_do_not_keep_a_command_from_a_running_server(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMSERVE__MODEL__MODEL", "no/such/model")
    monkeypatch.setattr("sys.argv", ["trimserve", "info", "--address", served.real])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert "trimserve-tiny" in capsys.readouterr().out


def told(status: int, arguments: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """The one line that a command fails with."""
    patch.setattr("sys.argv", ["trimserve", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    [line] = capsys.readouterr().err.splitlines()
    assert exit_.value.code == status, line
    return line


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("status", "arguments", "message"),
    [
        pytest.param(status, arguments, message, id=f"{kind}: {arguments[0]} {' '.join(arguments[-2:])}")
        for status, kinds in ((1, STATUS_1), (2, STATUS_2))
        for kind, cases in kinds.items()
        for arguments, message in cases
    ],
)
def test_an_error_is_one_line_that_names_what_is_wrong(
    status: int,
    arguments: list[str],
    message: str,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"REAL": served.real, "GUARDED": served.guarded}
    assert message in told(status, [places.get(each, each) for each in arguments], capsys, monkeypatch)


@pytest.mark.parametrize(
    ("status", "arguments", "message"),
    [
        (2, ["plan"], "--gpu-memory: must be given"),
        (2, ["plan", "--memory", "1GiB", "--bandwidth", "0"], "--bandwidth: must be above 0 and finite, got 0.0"),
        (2, ["plan", "--memory", "1GiB", "--kept-fraction", "2"], "--kept-fraction: must be in (0, 1], got 2.0"),
        (1, ["explain", "--prompt", "x", "--image", "no.png"], "no.png: No such file or directory"),
    ],
)
def test_what_is_typed_wrongly_is_told_before_slow_imports(
    status: int,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for slow in ("trimserve.planner", "trimserve.explain"):
        monkeypatch.setitem(sys.modules, slow, None)  # an import of it fails
    assert message in told(status, arguments, capsys, monkeypatch)


def test_a_prompt_on_standard_input_that_is_not_utf8_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff")))
    line = told(2, ["generate", "--prompt", "-"], capsys, monkeypatch)
    assert "--prompt: standard input must be UTF-8, got byte 0xff at position 3" in line


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("arguments", [["generate", "--prompt", "-"], ["chat"], ["batch", "-", "out"]])
@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_is_empty(
    stream: str, arguments: list[str], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setattr(f"sys.{stream}", None)
    monkeypatch.setattr("sys.argv", ["trimserve", *arguments, "--address", served.real])
    with pytest.raises(SystemExit) as exit_:
        main()
    getattr(sys, stream).close()  # as an end of the process would
    assert not exit_.value.code
