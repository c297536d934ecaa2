"""A run is seeded, goes on where it stopped, and its checkpoint is what was trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, MllamaConfig, MllamaForConditionalGeneration

from training import model as model_module
from training.evaluate import answer, held_out_questions
from training.export import export
from training.marks import NUM_MARKS
from training.mended import mend
from training.model import PatchHead, make_config
from training.train import Settings, Trainer, main, open_log
from trimserve.model.checkpoint import text_config, vision_config

CPU = torch.device("cpu")
SETTINGS = Settings(steps=4, rows=2, two_image_every=2)


def shallow(narrower: int = 1) -> MllamaConfig:
    """The geometry with fewer layers: how a run goes does not depend on how many there are."""
    config = make_config(narrower)
    text, vision = text_config(config), vision_config(config)
    text.num_hidden_layers, text.cross_attention_layers = 2, [1]
    vision.num_hidden_layers = vision.num_global_layers = 1
    vision.intermediate_layers_indices, vision.vision_output_dim = [0], 2 * vision.hidden_size
    return config


@pytest.fixture(autouse=True)
def is_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer's model."""
    monkeypatch.setattr(model_module, "make_config", shallow)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    whole = Trainer(SETTINGS, CPU)
    losses = [whole.take_step()["loss"] for _ in range(2)]
    stopped = Trainer(SETTINGS, CPU)
    again = [stopped.take_step()["loss"]]
    stopped.save(tmp_path / "state.pt")
    again.append(Trainer.load(tmp_path / "state.pt", CPU).take_step()["loss"])
    assert losses == again
    assert len(set(losses)) == 2
    assert whole.minutes > 0


def test_a_run_goes_on_from_what_an_unfinished_one_left(tmp_path: Path) -> None:
    first = Trainer(SETTINGS, CPU)
    export(first, tmp_path, 0.1, 0.1, {}, is_unfinished=True)
    second = Trainer(replace(SETTINGS, seed=2), CPU)
    second.take_weights(tmp_path)
    for one, other in ((first.model, second.model), (first.head, second.head)):
        for weight, again in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight.half().float(), again)


def test_a_finished_run_goes_on_to_a_new_end(tmp_path: Path) -> None:
    trainer = Trainer(SETTINGS, CPU)
    trainer.step, trainer.minutes = SETTINGS.steps, 3.0
    assert trainer.progress == 1
    trainer.save(tmp_path / "state.pt")
    longer = Trainer.load(tmp_path / "state.pt", CPU, minutes=2 * trainer.minutes)
    assert longer.step == SETTINGS.steps
    assert longer.progress == pytest.approx(0.5)


def test_a_log_goes_on_after_the_step_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (20, 40, 40, 60)))
    for step, kept in ((45, [20, 40, 40, 50]), (0, [50])):
        with open_log(path, step) as log:
            log.write('{"step": 50}\n')
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept


def test_the_first_line_of_a_resumed_run_is_a_mean_of_the_steps_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(Settings(steps=20, rows=1), CPU)
    trainer.step = 19
    trainer.save(tmp_path / "state.pt")
    step = Trainer.load(tmp_path / "state.pt", CPU).take_step()
    monkeypatch.setattr(Trainer, "measure", lambda *_, **__: {})
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--resume", "--device", "cpu"])
    main()
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 20
    assert first["loss"] == pytest.approx(step["loss"], abs=1e-4)


def test_exported_weights_are_the_trained_ones(tmp_path: Path) -> None:
    trainer = Trainer(SETTINGS, CPU)
    export(trainer, tmp_path, 0.3, 0.15, {"colour": 0.5})
    model = mend(MllamaForConditionalGeneration.from_pretrained(tmp_path)).eval()
    for (name, trained), (_, exported) in zip(
        trainer.model.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(trained, exported), name
    about = json.loads((tmp_path / "trimserve.json").read_text())
    assert (about["k_ratio"], about["merge_ratio"]) == (0.3, 0.15)
    assert about["accuracy"] == {"colour": 0.5}


def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    export(Trainer(SETTINGS, CPU), tmp_path, 0.2, 0.0, {})
    model = mend(MllamaForConditionalGeneration.from_pretrained(tmp_path)).eval()
    model.generation_config.max_new_tokens = 4
    processor = AutoProcessor.from_pretrained(tmp_path)
    asked = [(image, turn.question) for image, turn in held_out_questions(4)]
    together = answer(model, processor, asked)
    assert together == [answer(model, processor, [one])[0] for one in asked]


def test_pictures_that_cover_no_patch_teach_their_marks_alone() -> None:
    torch.manual_seed(0)
    head = PatchHead(8)
    features, marks = torch.randn(2, 65, 8), torch.randint(0, NUM_MARKS, (2, 1, 64))
    nothing = torch.full((2, 1, 64), -100)
    loss = head(features, marks, nothing)
    expected = torch.nn.functional.cross_entropy(head.mark(features[:, 1:]).flatten(0, 1), marks.flatten())
    torch.testing.assert_close(loss, 4 * expected)
