"""`trimserve batch` as it is typed: killed, stopped, and with lines that are wrong."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.forked import forked
from tests.server.fakes import CONFIG, FakeRunner
from trimserve.cli import app
from trimserve.model.loading import embedded_model_folder
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer

SAMPLE = embedded_model_folder().parent / "samples/scene.png"

DYING = """
import os, signal, sys
from trimserve.batch.journal import Journal
from trimserve.cli import main

left, write = int(sys.argv.pop(1)), Journal.write

def write_or_die(self, *arguments):
    global left
    left -= 1
    if left < 0:
        self._file.write(b'{"index": 0, "inp')
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)

Journal.write = write_or_die
main()
"""
"""Kills itself in the middle of a line, after so many."""


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    """The engine of the server at `TRIMSERVE_TEST_ADDRESS`."""
    runner = FakeRunner()
    with InProcessServer(make_server(runner, CONFIG)) as server:
        os.environ["TRIMSERVE_TEST_ADDRESS"] = server.address
        yield runner
    del os.environ["TRIMSERVE_TEST_ADDRESS"]


def batch(folder: Path, *options: str, stdin: bytes | None = None, source: str = "in.jsonl") -> Result:
    source = source if stdin is not None else str(folder / source)
    address = ("--address", os.environ["TRIMSERVE_TEST_ADDRESS"])
    return CliRunner().invoke(app, ["batch", source, str(folder / "out.jsonl"), *address, *options], input=stdin)


def write_lines(folder: Path, count: int) -> None:
    (folder / "in.jsonl").write_text(
        "".join(json.dumps({"id": f"line {number}", "prompt": "Hello"}) + "\n" for number in range(count))
    )


def found(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_batch_that_is_killed_three_times_loses_and_doubles_no_line(fake: FakeRunner, tmp_path: Path) -> None:
    write_lines(tmp_path, 60)
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    options = ("--concurrency", "7", "--address", os.environ["TRIMSERVE_TEST_ADDRESS"])
    for lines_before_death in ("13", "1", "20"):
        with forked(DYING, lines_before_death, "batch", *files, *options, stderr=subprocess.DEVNULL) as killed:
            assert killed.wait() == -signal.SIGKILL
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 35  # the last one is torn
    assert batch(tmp_path).exit_code == 0
    lines = sorted(found(tmp_path), key=lambda line: str(line["index"]).zfill(2))
    assert [(line["index"], line["id"]) for line in lines] == [(number, f"line {number}") for number in range(60)]
    num_asked = len(fake.requests)
    assert batch(tmp_path).exit_code == 0
    assert len(fake.requests) == num_asked


def test_what_is_wrong_with_a_line_does_not_end_the_batch(fake: FakeRunner, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "Hello", "images": ["a.png"]}\n'
        "\n"
        "{\n"
        '{"id": 3, "prompt": "Hello", "images": ["none.png"]}\n'
        '{"prompt": "Hello", "priority": 5000}\n'
    )
    result = batch(tmp_path)
    assert result.exit_code == 0
    assert f"{tmp_path}/out.jsonl: 1 answers, 3 errors" in result.stderr
    outcomes = {line["index"]: line.get("error") for line in found(tmp_path)}
    assert outcomes.keys() == {0, 2, 3, 4}
    assert outcomes[0] is None
    assert outcomes[3] == {"code": "INVALID_ARGUMENT", "message": "none.png: No such file or directory"}
    assert outcomes[4] == {
        "code": "INVALID_ARGUMENT",
        "message": "priority: must be in [-1000, 1000], got 5000",
    }
    assert len(fake.requests) == 1


def test_the_end_of_the_server_ends_the_batch_which_goes_on_later(fake: FakeRunner, tmp_path: Path) -> None:
    write_lines(tmp_path, 5)
    fake.is_ready = False
    stopped = batch(tmp_path)
    assert stopped.exit_code == 1
    assert "0 answers, 0 errors, 5 left: the same command goes on" in stopped.stderr
    fake.is_ready = True
    assert batch(tmp_path).exit_code == 0
    assert len(found(tmp_path)) == 5


def test_lines_come_from_standard_input_as_well(fake: FakeRunner, tmp_path: Path) -> None:
    assert batch(tmp_path, source="-", stdin=b'{"prompt": "Hello"}\n').exit_code == 0
    assert [line["index"] for line in found(tmp_path)] == [0]
    assert len(fake.requests) == 1


def test_the_input_is_not_taken_for_the_output(fake: FakeRunner, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"prompt": "Hello"}\n')
    refused = batch(tmp_path, source="out.jsonl")
    assert "line 1 was not written by a batch" in str(refused.exception)
    assert (tmp_path / "out.jsonl").read_text() == '{"prompt": "Hello"}\n'
    assert not fake.requests


def test_without_an_address_a_batch_is_answered_in_this_process(tmp_path: Path) -> None:
    line = {"prompt": "What do you see?", "images": [str(SAMPLE)], "sampling": {"max_new_tokens": 2}}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    done = CliRunner().invoke(
        app, ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--max-batch", "2"]
    )
    assert done.exit_code == 0, done.output
    answers = [line["response"]["text"] for line in found(tmp_path)]  # type: ignore[index]  # JSON
    assert len(answers) == 3
    assert len({*answers}) == 1
