"""The CUDA kernels on the CPU: the tests of the ops, with the threads of a block as fibers."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_cuda_kernels_pass_the_tests_of_the_ops_as_fibers() -> None:
    others = {"test_dispatch.py", "test_library.py"}  # of the CPU's kernels
    modules = [str(path) for path in sorted((ROOT / "tests/ops").glob("test_*.py")) if path.name not in others]
    command = [sys.executable, "-m", "pytest", "-q", "--device", "fibers", *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
