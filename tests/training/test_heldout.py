"""Held-out questions as files."""

from pathlib import Path

from training.heldout import write_held_out
from training.questions import KINDS
from trimserve.evaluation.dataset import describe_questions, load_questions


def test_the_same_seed_writes_the_same_data_set(tmp_path: Path) -> None:
    first, again, other = (
        load_questions(write_held_out(tmp_path / name, 20, seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert len(first) == 20
    assert {question.kind for question in first} <= KINDS.keys()
    assert describe_questions(first) == describe_questions(again) != describe_questions(other)
