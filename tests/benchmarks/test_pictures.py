"""What is said of harder pictures, from answers that are known."""

from pathlib import Path

from benchmarks.bench_pictures import backgrounds, lost_without
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import ALL_KINDS, Question

QUESTIONS = [
    Question(Path(f"{image}.png"), "What is shown?", "cat", kind)
    for image, kind in ((0, "object"), (1, "object"), (2, "busy"), (2, "busy"))
]


def _answers(*texts: str) -> list[Answer]:
    return [Answer(text, num_valid=100, num_held=20, divergence=0.0) for text in texts]


def test_a_change_of_background_is_told_apart_from_a_change_of_what_is_right() -> None:
    own = _answers("cat", "dog", "cat", "bird")
    other = _answers("cat", "cow", "dog", "bird")
    assert {name: figure["value"] for name, figure in backgrounds(QUESTIONS, own, other).items()} == {
        "own": 0.5,
        "other": 0.25,
        "change": -0.25,
        "differing": 0.5,
    }


def test_what_the_image_is_worth_is_told_by_kind() -> None:
    found = lost_without(QUESTIONS, _answers("cat", "cat", "cat", "dog"), _answers("dog", "cat", "dog", "dog"))
    changes = {kind: figures["change"]["value"] for kind, figures in found.items()}
    assert changes == {ALL_KINDS: -0.5, "busy": -0.5, "object": -0.5}
    assert [found["busy"][name]["value"] for name in ("image", "grey")] == [0.5, 0.0]
