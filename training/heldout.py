"""Writes held-out questions as files: `python -m training.heldout --questions 4000 --out DIR`.

The folder has `questions.jsonl` (image, question, answer, kind) and `images/`: what `trimserve eval --data` takes.
With `--pictures all` every kind of picture comes equally often, and a question's kind is its picture's. With
`--split train` digits and words are those that the model was trained with: for `trimserve train-compressor`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from training.examples import PICTURES, SCENES_ONLY, example_rng, generate_example
from training.scenes import Split
from trimserve.evaluation.dataset import Question, load_questions

__all__ = ["held_out", "main", "write_held_out"]


def write_held_out(
    folder: Path, num_questions: int, seed: int = 0, pictures: Sequence[str] = (), split: Split = "held_out"
) -> Path:
    """Write images and questions that training never saw; the same files every time.

    Args:
        folder: made if it is not there.
        num_questions: how many; the questions on one image follow each other.
        seed: another seed, other questions.
        pictures: kinds of pictures, of `PICTURES`; none is flat scenes, with their questions' own kinds.
        split: whose digits and words; of `train` none is in a question of `held_out`.
    Returns:
        The JSONL file.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for index in count():
        if len(lines) >= num_questions:
            break
        rng = example_rng(split, seed, index)
        shares = {pictures[index % len(pictures)]: 1.0} if pictures else SCENES_ONLY  # in turn: equally many of each
        example = generate_example(rng, split, pictures=shares)
        image = f"images/{index:05}.png"
        example.image.save(folder / image)
        for turn in example.turns:
            record = {"image": image, "question": turn.question, "answer": turn.answer}
            lines.append(json.dumps(record | {"kind": example.picture if pictures else turn.kind}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines[:num_questions]) + "\n")
    return path


@contextmanager
def held_out(num_questions: int, pictures: Sequence[str] = (), seed: int = 0) -> Iterator[list[Question]]:
    """The questions of `write_held_out`, loaded, while the block runs."""
    with TemporaryDirectory() as folder:
        yield load_questions(write_held_out(Path(folder), num_questions, seed, pictures))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", help=f"kinds, separated by commas, of {', '.join(PICTURES)}; all: every one")
    parser.add_argument("--split", choices=get_args(Split), default="held_out")
    arguments = parser.parse_args()
    asked = arguments.pictures.split(",") if arguments.pictures else []
    pictures = PICTURES if asked == ["all"] else asked
    if unknown := [name for name in pictures if name not in PICTURES]:
        parser.error(f"--pictures: must be among {', '.join(PICTURES)}, got {unknown[0]!r}")
    print(write_held_out(arguments.out, arguments.questions, arguments.seed, pictures, arguments.split))


if __name__ == "__main__":
    main()
