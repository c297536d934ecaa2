"""The script for a machine with a GPU brings along what is not there."""

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/first_gpu.sh"
THERE = {"torch", "transformers"}
OF_THE_SERVER = {
    "googleapis-common-protos",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "h11",
    "protobuf",
}
"""Not asked for by ops, model, engine and their benchmarks."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~]", requirement)[0] for requirement in requirements}


def test_every_dependency_of_ops_model_and_engine_is_brought() -> None:
    listed = subprocess.run([SCRIPT, "needed"], capture_output=True, text=True, check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = names(project["project"]["dependencies"]) - THERE - OF_THE_SERVER
    assert wanted <= names(listed)
    assert {"pytest", "hypothesis", "cmake", "ninja", "pybind11"} <= names(listed)


def test_each_step_that_it_names_exists() -> None:
    text = SCRIPT.read_text()
    steps = re.search(r"^# Steps: (.*?)\.", text, re.MULTILINE)
    assert steps is not None
    for step in steps[1].split():
        assert re.search(rf"^    (\w+ \| )?{step}( \| \w+)?\) ", text, re.MULTILINE), step
    unknown = subprocess.run([SCRIPT, "nonsense"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "no step nonsense" in unknown.stderr
