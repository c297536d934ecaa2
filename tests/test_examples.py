"""The examples, run by the commands of their README against a server of the embedded model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_repository import ROOT
from trimserve.serve import in_process_server

GENERATE, STREAM = re.findall(r"^\$ python (.+)$", (ROOT / "examples/python/README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of the embedded model."""
    with in_process_server() as server:
        yield server.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, beside the protos and the samples, with the stubs that README generates."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("protos", "trimserve"):
        (root / name).symlink_to(ROOT / name)
    folder = root / "examples/python"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "examples/python/stream.py", folder)
    generated = run(GENERATE, folder)
    assert generated.returncode == 0, generated.stderr
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the README in a Python that has the installed libraries, but not trimserve."""
    # -S leaves out the hook of an editable trimserve.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    line = f"{shlex.quote(sys.executable)} -S {command}"
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_api_pages_buf_curl_asks_by_reflection(address: str) -> None:
    page = (ROOT / "docs/api.md").read_text()
    [command] = re.findall(r"^\$ (buf curl(?:.|\n)+?)\n```", page, re.MULTILINE)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = command.replace("127.0.0.1:50051", address)
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"]


def test_readmes_commands_generate_stubs_and_stream_an_answer(folder: Path, address: str) -> None:
    done = run(STREAM.replace("127.0.0.1:50051", address), folder)
    assert done.returncode == 0, done.stderr
    answer, account = done.stdout.splitlines()
    assert answer
    assert re.fullmatch(r"kept \d+ of \d+ visual features, \d+ merged rows", account)


def test_a_refused_request_prints_status_and_field(folder: Path, address: str) -> None:
    done = run(f"stream.py {address} stream.py What?", folder)
    assert done.returncode == 1
    status, field = done.stderr.splitlines()
    assert status.startswith("INVALID_ARGUMENT: ")
    assert field == "field: chat.messages[0].parts[0].image"


def test_an_unreachable_server_prints_its_status(folder: Path) -> None:
    done = run("stream.py 127.0.0.1:1 stream.py What?", folder)
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")
