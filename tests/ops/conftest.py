"""The devices that the ops are tested on: the CPU, a GPU where there is one, and the GPU's kernels on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.csrc.build import load_fibers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        metafunc.parametrize("device", [chosen] if chosen else ["cpu", "cuda"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """`cpu`, `cuda` or `fibers`, the kernels of `cuda` on CPU tensors. New tensors are made there."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        if request.config.getoption("--device"):
            pytest.fail("torch sees no GPU")
        pytest.skip("needs a GPU")
    if name == "fibers":
        load_fibers()
    if name == "cuda":
        with torch.device("cuda"):
            yield name
    else:
        yield name


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
