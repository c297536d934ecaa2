"""A random checkpoint as trimserve and as the peer load it, shared by the tests of this folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.model.peer import Peer
from tests.model.random_checkpoint import Geometry, equip, save_random_checkpoint
from trimserve.api.prompt import Prompt
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

NO_TRIM = TrimPlan.of(TrimRequest(enabled=False))


@dataclass(frozen=True)
class Pair:
    """One checkpoint, loaded twice."""

    folder: Path
    ours: Mllama
    peer: Peer

    @property
    def pool(self) -> OwnPages:
        """A fresh pool of the model's geometry."""
        return OwnPages(self.ours.info, 2**24)

    def encoded(self, prompt: PreparedPrompt, trim: TrimPlan = NO_TRIM) -> list[EncodedImage]:
        """Each image, with what the policy needs."""
        return [run_through(self.ours.encode_image(image, trim.needs)) for image in prompt.images]

    def granted(self, prompt: PreparedPrompt, num_new: int = 0, pool: OwnPages | None = None) -> OwnKeyValues:
        """Pages for a prompt, all of its images and so many new tokens; of a pool of its own unless one is given."""
        num_rows = sum(image.num_tiles for image in prompt.images) * self.ours.info.features_per_tile
        return (pool or self.pool).key_values(len(prompt.token_ids) + num_new, num_rows)

    def logits(self, prompt: Prompt, trim: TrimPlan = NO_TRIM) -> tuple[Tensor, OwnKeyValues]:
        """Logits of every prompt row, and the keys and values."""
        prepared = self.ours.prepare(prompt)
        kv = self.granted(prepared, 16)
        rows = self.ours.prompt_rows(prepared, self.encoded(prepared, trim), trim, kv)
        return self.ours.logits([rows], prepared.token_ids), kv


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Save a random checkpoint of a geometry and load it with both."""

    def make(geometry: Geometry, seed: int = 0, **model_config: Any) -> Pair:
        folder = tmp_path_factory.mktemp("checkpoint")
        save_random_checkpoint(folder, geometry, seed)
        ours = load_model(ModelConfig(model=str(folder), **model_config), EngineConfig())
        return Pair(folder, ours, Peer(folder))

    return make


@pytest.fixture(scope="session")
def equipped(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The usual checkpoint with a drawn codebook, and with itself as its guide: every policy can be asked."""
    codebook = tmp_path_factory.mktemp("codebook") / "codebook.safetensors"
    config = equip(ModelConfig(model=str(pair.folder)), codebook)
    return replace(pair, ours=load_model(config, EngineConfig()))


@pytest.fixture(scope="session")
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """The usual geometry."""
    return make_pair(Geometry())


@pytest.fixture
def checkpoint(pair: Pair, tmp_path: Path) -> Path:
    """A folder that loads; tests break it."""
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path
