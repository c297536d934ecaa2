"""The table of harder pictures is what the report says."""

from pathlib import Path

from scripts.generate.picture_tables import cost_by_picture
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.report import make_report


def test_each_kind_of_picture_has_its_points_from_untrimmed() -> None:
    questions = [
        Question(Path(f"{number}.png"), "What is shown?", "cat", kind)
        for number, kind in enumerate(("busy", "busy", "page", "page"))
    ]
    texts = (("cat", "cat"), ("cat", "dog"), ("dog", "dog"), ("cat", "cat"))
    answers = [[Answer(text, num_valid=10, num_held=5, divergence=0.0) for text in pair] for pair in texts]
    data = {"num_questions": 4, "num_images": 4, "kinds": {"busy": 2, "page": 2}}
    trims = [TrimRequest(budget=FixedRatio(0.5), merge_ratio=0.1)]
    lines = cost_by_picture(make_report(questions, answers, trims, run={}, model={}, data=data)).splitlines()
    shown = {lines[i].split("**")[1]: lines[i + 4] for i in range(len(lines)) if lines[i].startswith("**")}
    assert shown["busy"].startswith("| `trimmed`, merged | -50.0 [")
    assert shown["page"] == "| `trimmed`, merged | +0.0 [+0.0, +0.0] |"
