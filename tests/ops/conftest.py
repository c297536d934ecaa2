"""The devices that the ops are tested on: the CPU, a GPU where there is one, and the GPU's kernels on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.csrc.build import load_fibers


@pytest.fixture(scope="module")
def device(device: str) -> Iterator[str]:
    """`cpu`, `cuda` or `fibers`, the kernels of `cuda` on CPU tensors. New tensors are made there."""
    if device == "fibers":
        load_fibers()
    if device == "cuda":
        with torch.device("cuda"):
            yield device
    else:
        yield device


@pytest.fixture
def host(device: str) -> None:
    """For tests of tensors that were made when their module was imported."""
    if device == "cuda":
        pytest.skip("these tensors are on the host")


@pytest.fixture
def checked_values(device: str) -> None:
    """For tests of refused values."""
    if device != "cpu":
        pytest.skip("values on a GPU are not checked, see test_unchecked_values.py")
