"""Kernels for every width of vectors: machines with less than this one has get the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.csrc.test_cuda_kernels import FEW_EXAMPLES

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/ops/test_headwise_topk.py::test_equals_reference_at_real_size",
    "tests/ops/test_attention.py::test_equals_reference",
    "tests/ops/test_attention.py::test_a_row_gets_the_same_bits_alone_and_in_any_company",
    "tests/ops/test_int8_pages.py::test_writing_equals_the_reference",
    "tests/ops/test_int8_pages.py::test_reading_equals_the_reference",
    "tests/ops/test_headwise_scores.py::test_equals_reference",
    "tests/ops/test_headwise_scores.py::test_log_sums_of_attention_change_nothing_but_the_last_bits",
    "tests/ops/test_paged_attention.py::test_equals_reference",
    "tests/ops/test_paged_attention.py::test_results_are_rounded_once_to_the_nearest",
    "tests/ops/test_select_features.py::test_hand_worked_selections",
    "tests/ops/test_linear.py::test_equals_reference",
    "tests/ops/test_linear.py::test_sums_of_small_integers_are_exact_where_rows_are_bfloat16",
    "tests/ops/test_linear.py::test_a_row_is_the_same_to_the_last_bit_in_every_batch_and_on_every_thread",
    "tests/ops/test_rows.py",
]


CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_lesser_machines_equal_the_reference(capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability().lower()
    if own != "avx512" and own in CAPABILITIES[: CAPABILITIES.index(capability) + 1]:
        pytest.skip(f"this machine has {own}, whose kernels the other tests run")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", *FEW_EXAMPLES, *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
