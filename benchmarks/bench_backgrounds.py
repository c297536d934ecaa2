"""Whether a question about a busy picture is answered from what lies on the photograph, or from the photograph.

    python -m benchmarks.bench_backgrounds [--questions 500] [--model DIR] [--out FILE]

The same held-out questions about the same scenes, on two photographs each, answered untrimmed. No times are measured:
a busy machine does no harm.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.pictures import bootstrap_of, interval, is_right, load
from benchmarks.report import finish, options
from training.backgrounds import BACKGROUNDS, write_backgrounds
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question, describe_questions, load_questions

__all__ = ["figures", "main", "table"]


def figures(
    questions: Sequence[Question], own: Sequence[Answer], other: Sequence[Answer]
) -> dict[str, dict[str, float]]:
    """How much another background changes.

    Args:
        questions: with what is right.
        own: answers on one background.
        other: answers to the same questions on another one.
    Returns:
        Accuracy on each, `change` of the accuracy, and `differing`, the share of answers that are others; each with
        its 95 % interval.
    """
    on_own, on_other = is_right(questions, own), is_right(questions, other)
    differs = np.array([one.text != two.text for one, two in zip(own, other, strict=True)], float)
    found = {"own": on_own, "other": on_other, "change": on_other - on_own, "differing": differs}
    bootstrap = bootstrap_of(questions)
    return {name: asdict(bootstrap.mean(values)) for name, values in found.items()}


def table(report: dict[str, Any]) -> str:
    """What was found, in a sentence."""
    data = report["data"]
    return (
        f"{data['num_questions']:,} questions about {data['num_images']:,} busy scenes: {report['own']['value']:.1%} "
        f"right on one background, {report['other']['value']:.1%} on another, a change of "
        f"{interval(report['change'])} points; {report['differing']['value']:.1%} of the answers differ."
    )


def main() -> None:
    """Ask, write, tell."""
    parser = options(__doc__, "pictures/backgrounds.json")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--model", help="folder; default: the embedded model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.model)
    with TemporaryDirectory() as folder:
        files = write_backgrounds(Path(folder), arguments.questions)
        asked = [load_questions(files[background]) for background in BACKGROUNDS]
        answers = [[answer for [answer] in model.answers(questions, [])] for questions in asked]
        data = describe_questions(asked[0])
    found = {"model": model.describe(), "data": data, **figures(asked[0], *answers)}
    print(table(finish("backgrounds", arguments.out, found)))


if __name__ == "__main__":
    main()
