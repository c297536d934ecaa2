"""The CUDA kernels on the CPU: the tests of the ops, with the threads of a block as fibers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FEW_EXAMPLES = ["--hypothesis-profile", "few"]  # a thousand fibers take their time


@pytest.mark.timeout(900)
def test_cuda_kernels_pass_the_tests_of_the_ops_as_fibers() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--device", "fibers", *FEW_EXAMPLES, "tests/ops"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_model_and_engine_pass_their_tests_on_a_pretended_gpu() -> None:
    bucketed = "tests/model/test_bucketed_decode.py::test_rows_that_pad_a_batch_change_no_page_but_the_last"
    paths = [bucketed, "tests/engine/test_devices.py", "tests/ops/test_cuda_graphs.py"]  # `make verify` runs more
    command = [sys.executable, "-m", "pytest", "-q", "--device", "pretend", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_chosen_device_selects_every_test_that_depends_on_one() -> None:
    paths = ["tests/model/test_bucketed_decode.py", "tests/model/test_chat.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--device", "cuda", *paths]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum("test_a_batch_of_any_size" in line for line in lines) > 1
    assert not any("test_chat" in line for line in lines)
