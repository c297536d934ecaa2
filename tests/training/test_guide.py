"""A guide learns to look where its model looks, and is a model that `guided` takes."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.test_train import CPU, SETTINGS, shallow
from training import model as model_module
from training.export import export
from training.guide import Teacher
from training.model import read_batch
from training.train import Trainer
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model


@pytest.fixture(autouse=True)
def is_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer's model."""
    monkeypatch.setattr(model_module, "make_config", shallow)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An exported model that is to be guided."""
    folder = tmp_path / "whole"
    export(Trainer(SETTINGS, CPU), folder, 0.1, 0.1, {})
    return folder


def test_a_guide_begins_with_every_second_channel(whole: Path) -> None:
    guide = Trainer(replace(SETTINGS, guide_of=str(whole)), CPU).model.model.language_model.layers[1].cross_attn
    model = Trainer(SETTINGS, CPU).model.model.language_model.layers[1].cross_attn
    assert torch.equal(guide.q_proj.weight, model.q_proj.weight[::2, ::2])
    assert torch.equal(guide.k_norm.weight, model.k_norm.weight[::2])


def test_a_models_own_look_and_answers_are_no_loss_and_others_are(whole: Path) -> None:
    trainer = Trainer(SETTINGS, CPU)
    teacher = Teacher(whole, trainer.model)  # of the same width: nothing is left out
    for num_images in (1, 2):
        batch = trainer.batcher.make(random.Random(1), "train", 2, num_images)
        logits, _ = read_batch(trainer.model, batch)
        assert all(loss.item() == 0 for loss in teacher.losses(batch, logits))
    with torch.no_grad():
        trainer.model.model.language_model.layers[1].cross_attn.q_norm.weight.mul_(2)
    logits, _ = read_batch(trainer.model, batch)
    assert all(loss.item() > 1e-6 for loss in teacher.losses(batch, logits))


def test_a_trained_guide_is_exported_and_guides(whole: Path, tmp_path: Path) -> None:
    trainer = Trainer(replace(SETTINGS, guide_of=str(whole)), CPU)
    step = trainer.take_step()
    assert step["loss"] == pytest.approx(step["answers"] + step["attention"])
    trainer.save(tmp_path / "state.pt")
    export(Trainer.load(tmp_path / "state.pt", CPU), tmp_path / "guide", 0.1, 0.1, {})
    model = load_model(ModelConfig(model=str(whole), guide_model=str(tmp_path / "guide")), EngineConfig())
    assert model.info.guide is not None
    assert model.info.guide.hidden_size == model.info.hidden_size // 2
