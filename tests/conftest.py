"""What every test shares: one torch thread, hypothesis without deadlines, an environment without proxies and knobs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from trimserve.environment import shut_out

# Tests reach servers on loopback with bare channels, and say themselves which knobs and proxies are set.
shut_out()
for name in [*os.environ]:
    if name.lower().endswith("_proxy") or name.upper().startswith("TRIMSERVE_"):
        del os.environ[name]

# One thread: with more, a busy neighbour stalls every op at the thread pool's barrier.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start, too

# No deadline: the first example pays for compilation and caches. CI draws the same examples on every run, so
# that its failures can be replayed.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("few", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "fibers", "pretend"],
        help="run only tests that need a device, on this one",
    )
    parser.addoption(
        "--speculated", type=int, default=30, help="random requests that are answered with and without drafts"
    )
    parser.addoption("--mixes", type=int, default=20, help="random mixes of requests that are compared with each alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        metafunc.parametrize("device", [chosen] if chosen else ["cpu", "cuda"], indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device"):
        on_it = [item for item in items if "device" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in on_it])
        items[:] = on_it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights in the usual geometry."""
    from tests.model.random_checkpoint import Geometry, save_random_checkpoint  # most tests need no transformers

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, Geometry())
    return folder


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """`cpu`, or `cuda` where there is a GPU or one is pretended."""
    name: str = request.param
    if name == "pretend":
        from tests.pretended.runtime import pretended_device

        with pretended_device():
            yield "cuda"
        return
    if name == "cuda" and not torch.cuda.is_available():
        if request.config.getoption("--device"):
            pytest.fail("torch sees no GPU")
        pytest.skip("needs a GPU")
    yield name


@pytest.fixture
def mixes(request: pytest.FixtureRequest) -> int:
    """How many random mixes of requests to try."""
    count: int = request.config.getoption("--mixes")
    return count


@pytest.fixture(scope="session")
def speculated(request: pytest.FixtureRequest) -> int:
    """How many random requests to answer with and without drafts."""
    count: int = request.config.getoption("--speculated")
    return count
