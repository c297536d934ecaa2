"""What is in the environment of a command and may not change what it does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from trimserve.environment import SHUT_OUT

TABLE = Path(__file__).parent.parent / "docs/environment.md"

# A command first; then what is left for the C library, torch and a server's metrics to see.
PROGRAM = """
import ctypes, json, os, sys
from trimserve.cli import main
sys.argv = ["trimserve", "--version"]
try:
    main()
except SystemExit:
    pass
import torch
from prometheus_client import generate_latest
from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import Metrics
from trimserve.trimming.policies.table import POLICIES
metrics = Metrics(POLICIES, RPCS)
metrics.saw_step(3, 0.5)
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print(json.dumps({
    "seen": [name for name in sys.stdin.read().split() if name in os.environ or getenv(name.encode())],
    "precision": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
    "page": generate_latest(metrics.registry).decode(),
}))
"""


class Said(NamedTuple):
    """What the program says, and the folder that it was told to share metrics in."""

    seen: list[str]
    precision: list[object]
    page: str
    folder: Path


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp("multiproc")
    values = {name: str(folder) if "MULTIPROC" in name.upper() else "1" for name in SHUT_OUT}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | values,
        input=" ".join(SHUT_OUT),
        capture_output=True,
        text=True,
        check=True,
    )
    return Said(**json.loads(done.stdout.splitlines()[-1]), folder=folder)


@pytest.mark.parametrize("variable", SHUT_OUT)
def test_a_variable_that_is_shut_out_is_gone_for_compiled_code_too(variable: str, said: Said) -> None:
    assert variable not in said.seen


def test_float32_stays_float32_where_the_environment_rounds_it(said: Said) -> None:
    assert said.precision == ["highest", False]


def test_metrics_are_this_processs_own_where_the_environment_shares_them(said: Said) -> None:
    assert re.search(r"^trimserve_batch_size_sum\{.*\} 3\.0$", said.page, re.MULTILINE)
    assert not [*said.folder.iterdir()]


def test_importing_trimserve_leaves_the_environment_of_a_program_alone() -> None:
    program = "import os, trimserve.environment, trimserve.cli; print(os.environ['PROMETHEUS_MULTIPROC_DIR'])"
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": "mine"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n"


def test_the_table_has_every_variable_that_is_shut_out() -> None:
    shut_out = "".join(line for line in TABLE.read_text().splitlines() if line.endswith("| shut out |"))
    assert {*re.findall(r"`(\w+)`", shut_out)} >= {*SHUT_OUT}
