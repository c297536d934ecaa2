"""The pretended device, and a model on it."""

from collections.abc import Iterator

import pytest
import torch

from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.pretended.device import Device
from tests.pretended.runtime import pretended_device
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama


@pytest.fixture(scope="module")
def gpu() -> Iterator[Device]:
    """Pretended, so not where there is a real one."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pretended_device() as device:
        yield device


@pytest.fixture(scope="module")
def model(gpu: Device, tmp_path_factory: pytest.TempPathFactory) -> Mllama:  # noqa: ARG001 - it loads there
    """Random weights in bfloat16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, Geometry(num_layers=6, cross_layers=(0, 2, 5)))
    return load_model(ModelConfig(model=str(folder), device="cuda", dtype="bfloat16"), EngineConfig())
