"""Busy questions asked twice: the same scenes on other backgrounds. What changes was read from the photograph."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from training.examples import example_rng, generate_example
from training.photographs import sample_backdrop
from training.render import render

__all__ = ["BACKGROUNDS", "write_backgrounds"]

BACKGROUNDS = ("own", "other")


@dataclass(frozen=True, slots=True)
class _Line:
    index: int
    question: str
    answer: str


def write_backgrounds(folder: Path, num_questions: int, seed: int = 0) -> dict[str, Path]:
    """Write the same held-out questions about the same scenes, on two backgrounds each.

    Args:
        folder: made if it is not there.
        num_questions: how many.
        seed: another seed, other questions.
    Returns:
        For each of `BACKGROUNDS` its JSONL file; their lines differ in nothing but the image.
    """
    for name in BACKGROUNDS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines: list[_Line] = []
    for index in count():
        if len(lines) >= num_questions:
            break
        lines += _draw(folder, index, seed)
    written = {}
    for name in BACKGROUNDS:
        records = (
            {"image": f"{name}/{line.index:05}.png", "question": line.question, "answer": line.answer, "kind": "busy"}
            for line in lines[:num_questions]
        )
        written[name] = folder / f"{name}.jsonl"
        written[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return written


def _draw(folder: Path, index: int, seed: int) -> Iterator[_Line]:
    example = generate_example(example_rng("held_out", seed, index), "held_out", pictures={"busy": 1.0})
    assert example.scene is not None
    for number, name in enumerate(BACKGROUNDS):
        backdrop = sample_backdrop(example_rng("held_out", seed, -1 - 2 * index - number), "held_out")
        render(example.scene, 1, backdrop).save(folder / name / f"{index:05}.png")
    for turn in example.turns:
        yield _Line(index, turn.question, turn.answer)
