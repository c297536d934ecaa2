"""README's tables are the report's, and trimserve answers as the mended peer that the report measured."""

import json
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

from training import readme
from training.evaluate import answer
from training.examples import DATA_VERSION
from training.export import CHECKPOINT
from training.heldout import write_held_out
from training.mended import mend
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.dataset import load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import Report, Row
from trimserve.model.loading import describe_model, load_model

FOLDER = Path(readme.__file__).parent
REPORT = json.loads((FOLDER / "report.json").read_text())
EVALUATION = Report.from_json(readme.EVALUATION.read_text())


def overall(policy: str) -> list[Row]:
    """Rows of a policy over all questions."""
    return [row for row in EVALUATION.rows if (row.policy, row.kind) == (policy, "all")]


def test_readme_shows_what_was_measured() -> None:
    text = (FOLDER / "README.md").read_text()
    assert readme.accuracy_table(REPORT) in text
    assert readme.trimming_table(EVALUATION) in text
    second = (Report.from_json(path.read_text()) for path in (readme.SECOND_EDITION / "scenes.json", readme.PICTURES))
    assert readme.second_edition_table(REPORT, *second) in text


def test_reports_speak_of_the_shipped_checkpoint() -> None:
    about = json.loads((CHECKPOINT / "trimserve.json").read_text())
    assert about["accuracy"] == REPORT["accuracy"]
    assert about["training_steps"] == REPORT["training"]["training_steps"]
    assert about["data_version"] == REPORT["data_version"] == DATA_VERSION
    assert EVALUATION.model["revision"] == describe_model(ModelConfig(), EngineConfig()).revision


def test_the_recommended_budget_keeps_at_most_half_and_costs_at_most_a_point() -> None:
    about = json.loads((CHECKPOINT / "trimserve.json").read_text())
    recommended = (about["k_ratio"], about["merge_ratio"])
    [row] = [row for row in overall("trimmed") if (row.k_ratio, row.merge_ratio) == recommended]
    assert row.kept_fraction <= 0.5
    assert row.accuracy_change.value >= -0.01


def test_picking_beats_blind_choice_of_as_many_features_by_five_points_somewhere_below_a_quarter() -> None:
    gains: dict[tuple[float, float], dict[str, float]] = {}
    for advantage in EVALUATION.advantages:
        if advantage.kind == "all" and advantage.kept_fraction <= 0.25:
            budget = advantage.k_ratio, advantage.merge_ratio
            gains.setdefault(budget, {})[advantage.over] = advantage.accuracy.value
    assert any(gain.keys() == {"random", "strided"} and min(gain.values()) >= 0.05 for gain in gains.values())


def test_the_untrimmed_model_is_good_enough_to_measure_on() -> None:
    assert REPORT["questions"]["overall"] >= 4000
    estimates = {name: estimate["value"] for name, estimate in REPORT["estimates"].items()}
    assert estimates["single_word"] >= 0.95
    assert estimates["reading"] >= 0.85
    assert estimates["description"] >= 0.80
    assert REPORT["estimates"]["loss_with_grey_image"]["low"] >= 0.30
    assert estimates["objects_per_description"] >= 3


def test_log_ends_with_the_last_step() -> None:
    last = json.loads((FOLDER / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == REPORT["training"]["training_steps"]
    assert last["held_out"]["shape"] > 0.9


def test_untrimmed_answers_are_the_peers(tmp_path: Path) -> None:
    questions = load_questions(write_held_out(tmp_path, 12, seed=3))
    ours = InProcess(load_model(ModelConfig(), EngineConfig()))
    peer = mend(MllamaForConditionalGeneration.from_pretrained(CHECKPOINT)).eval()
    asked = []
    for question in questions:
        with Image.open(question.image) as image:
            asked.append((image.convert("RGB"), question.text))
    expected = answer(peer, AutoProcessor.from_pretrained(CHECKPOINT), asked)
    assert [untrimmed.text for [untrimmed] in ours.answers(questions, [])] == expected
    assert len(set(expected)) > 3
