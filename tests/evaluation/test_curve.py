"""Curves and calibration over an answerer that is known in closed form."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.curve import MAX_PROBES, calibrate, measure_curve
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.report import Report, Row

NUM_VALID = 100


class Known:
    """Answers `right` where k_ratio reaches the question's number in tenths; divergence falls with k_ratio."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.asked: list[Sequence[TrimRequest]] = []

    @property
    def policies(self) -> Sequence[str]:
        return ("trimmed", "random")

    def describe(self) -> dict[str, Any]:
        return {"model": "known", "revision": "0123456789abcdef"}

    def answers(
        self, questions: Iterable[Question], trims: Sequence[TrimRequest], *, max_new_tokens: int | None = None
    ) -> Iterator[list[Answer]]:
        self.asked.append(trims)
        self.max_new_tokens = max_new_tokens
        for question in questions:
            needed = int(question.text) / 10
            row = [Answer("right", NUM_VALID, NUM_VALID, 0.0)]
            for trim in trims:
                is_right = trim.k_ratio >= needed and trim.policy == "trimmed"
                row.append(
                    Answer(
                        "right" if is_right else "wrong", NUM_VALID, round(NUM_VALID * trim.k_ratio), 1 - trim.k_ratio
                    )
                )
            yield row


@pytest.fixture
def ten_questions(tmp_path: Path) -> list[Question]:
    """Numbers 0 to 9, odd ones of kind `odd`, each about an image of its own."""
    questions = []
    for number in range(10):
        image = tmp_path / f"{number}.png"
        image.write_bytes(bytes([number]))
        questions.append(Question(image, str(number), "right", "odd" if number % 2 else "even"))
    return questions


TRIMS = [TrimRequest(policy=policy, k_ratio=k_ratio) for policy in ("trimmed", "random") for k_ratio in (0.2, 1.0)]


def row(report: Report, policy: str, k_ratio: float, kind: str = "all") -> Row:
    [found] = [r for r in report.rows if (r.policy, r.k_ratio, r.kind) == (policy, k_ratio, kind)]
    return found


def test_a_curve_counts_matches_fractions_and_divergences_by_kind(ten_questions: list[Question]) -> None:
    ticks: list[None] = []
    report = measure_curve(Known(), ten_questions, TRIMS, on_question=lambda: ticks.append(None))
    assert len(ticks) == 10
    assert row(report, "untrimmed", 1.0).accuracy.value == 1
    trimmed = row(report, "trimmed", 0.2)  # right: 0, 1, 2
    assert (trimmed.num_questions, trimmed.kept_fraction) == (10, 0.2)
    assert trimmed.accuracy.value == pytest.approx(0.3)
    assert trimmed.accuracy_change.value == pytest.approx(-0.7)
    assert trimmed.divergence.value == pytest.approx(0.8)
    assert trimmed.accuracy.low < 0.3 < trimmed.accuracy.high
    assert row(report, "trimmed", 0.2, "odd").accuracy.value == pytest.approx(0.2)
    assert row(report, "trimmed", 0.2, "even").accuracy.value == pytest.approx(0.4)
    [advantage] = [a for a in report.advantages if (a.k_ratio, a.kind) == (0.2, "all")]
    assert (advantage.policy, advantage.over, advantage.kept_fraction) == ("trimmed", "random", 0.2)
    assert advantage.accuracy.value == pytest.approx(0.3)
    assert advantage.accuracy.low > 0


def test_k_ratio_1_takes_over_the_untrimmed_answers_without_asking(ten_questions: list[Question]) -> None:
    known = Known()
    report = measure_curve(known, ten_questions, TRIMS)
    assert [trim.k_ratio for trim in known.asked[0]] == [0.2, 0.2]
    for policy in ("trimmed", "random"):
        whole = row(report, policy, 1.0)
        assert (whole.kept_fraction, whole.divergence.value, whole.accuracy_change.value) == (1, 0, 0)


def test_a_report_survives_json_and_says_how_it_came_about(ten_questions: list[Question]) -> None:
    report = measure_curve(Known(), ten_questions, TRIMS)
    assert Report.from_json(report.to_json()) == report
    assert report.model["model"] == "known"
    assert report.data["kinds"] == {"even": 5, "odd": 5}
    assert {"machine", "versions", "commit", "seconds", "answers_per_second"} == report.run.keys()


def test_a_report_is_drawn(ten_questions: list[Question], tmp_path: Path) -> None:
    from PIL import Image

    from trimserve.evaluation.picture import draw_curves

    draw_curves(measure_curve(Known(), ten_questions, TRIMS), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50


def test_a_comparison_is_drawn(ten_questions: list[Question], tmp_path: Path) -> None:
    from PIL import Image

    from trimserve.evaluation.comparison import draw_comparison

    trims = [
        TrimRequest(policy=policy, budget=FixedRatio(share), merge_ratio=merge_ratio)
        for policy in ("random", "trimmed", "cls")
        for merge_ratio in (0.0, 0.1)
        for share in (0.2, 0.5)
    ]
    draw_comparison(measure_curve(Known(), ten_questions, trims), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 900
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50


@pytest.mark.parametrize(
    ("bound", "k_ratio"),
    [(0.305, 0.70), (0.8, 0.20), (0.0, 1.0), (1.0, 0.01)],  # the divergence is 1 - k_ratio
)
def test_calibration_names_the_smallest_k_ratio_within_the_bound(
    ten_questions: list[Question], bound: float, k_ratio: float
) -> None:
    known = Known()
    found = calibrate(known, ten_questions, bound + 1e-12, TrimRequest())
    assert found.k_ratio == k_ratio
    assert known.max_new_tokens == 1
    assert len(found.probes) <= MAX_PROBES
    for probe in found.probes:
        assert probe.kept_fraction == pytest.approx(probe.k_ratio)
        assert math.isclose(probe.divergence, 1 - probe.k_ratio)
        assert (probe.divergence <= bound + 1e-12) == (probe.k_ratio >= k_ratio)


def test_calibration_needs_no_answers(ten_questions: list[Question]) -> None:
    unlabelled = [Question(question.image, question.text) for question in ten_questions]
    assert calibrate(Known(), unlabelled, 0.505, TrimRequest()) == calibrate(
        Known(), ten_questions, 0.505, TrimRequest()
    )
