"""A random checkpoint and a few questions about random images, shared by the tests of this folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

QUESTIONS = ("What is this?", "How many?", "Red or blue?")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the usual geometry."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, Geometry())
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Mllama:
    """The checkpoint, loaded."""
    return load_model(ModelConfig(model=str(checkpoint)), EngineConfig())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about two images."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index, (width, height) in enumerate([(24, 24), (60, 40)]):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines += [
            json.dumps({"image": f"{index}.png", "question": text, "answer": "yes", "kind": ("short", "long")[index]})
            for text in QUESTIONS
        ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def questions(data: Path) -> list[Question]:
    """The same, loaded."""
    return load_questions(data)
