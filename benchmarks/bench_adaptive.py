"""What budgets are worth that differ from image to image, by kind of picture.

    python -m benchmarks.bench_adaptive [--questions 1000] [--model DIR] [--out FILE]

`trimmed` answers held-out questions about every kind of picture under `top_p` and `knee`, and under a fixed budget that
keeps the same mean share of the features; the differences are paired. No times are measured: a busy machine does no
harm.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.pictures import bootstrap_of, interval, is_right, load
from benchmarks.report import finish, markdown, options
from training.examples import PICTURES
from training.heldout import write_held_out
from trimserve.api.trim import Budget, FixedRatio, Knee, TopP, TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions, load_questions
from trimserve.evaluation.in_process import InProcess

__all__ = ["compared", "main", "table"]

_ADAPTIVE: Final[dict[str, Budget]] = {
    "top_p 0.5": TopP(0.5),
    "top_p 0.7": TopP(0.7),
    "top_p 0.9": TopP(0.9),
    "knee": Knee(),
}
_MERGE_RATIOS: Final = (0.0, 0.1)


def compared(
    questions: Sequence[Question], adaptive: Sequence[Answer], fixed: Sequence[Answer]
) -> dict[str, dict[str, Any]]:
    """An adaptive budget beside a fixed one, for all questions and for each kind.

    Args:
        questions: with what is right.
        adaptive: answers under the adaptive budget.
        fixed: answers under the fixed one.
    Returns:
        For each kind the mean shares held, both accuracies and `gain`, adaptive minus fixed, with its interval.
    """
    both = {"adaptive": adaptive, "fixed": fixed}
    right = {name: is_right(questions, answers) for name, answers in both.items()}
    held = {name: np.array([each.num_held / each.num_valid for each in answers]) for name, answers in both.items()}
    kinds = np.array([question.kind for question in questions])
    bootstrap = bootstrap_of(questions)
    found = {}
    for kind in (ALL_KINDS, *np.unique(kinds).tolist()):
        where: NDArray[np.bool_] = np.ones(len(kinds), np.bool_) if kind == ALL_KINDS else kinds == kind
        found[kind] = {
            "num_questions": int(where.sum()),
            "held": {name: round(float(values[where].mean()), 4) for name, values in held.items()},
            "accuracy": {name: asdict(bootstrap.mean(values, where)) for name, values in right.items()},
            "gain": asdict(bootstrap.mean(right["adaptive"] - right["fixed"], where)),
        }
    return found


def _rows(model: InProcess, questions: Sequence[Question]) -> list[dict[str, Any]]:
    wanted = [TrimRequest(budget=budget) for budget in _ADAPTIVE.values()]
    asked = model.answers(questions, wanted, max_new_tokens=1)
    kept = np.array([[each.num_held / each.num_valid for each in answers[1:]] for answers in asked]).mean(axis=0)
    rows = []
    for merge_ratio in _MERGE_RATIOS:
        adaptive = [replace(trim, merge_ratio=merge_ratio) for trim in wanted]
        fixed = [replace(trim, budget=FixedRatio(float(share))) for trim, share in zip(adaptive, kept, strict=True)]
        columns = list(zip(*model.answers(questions, [*adaptive, *fixed]), strict=True))[1:]
        for number, name in enumerate(_ADAPTIVE):
            kinds = compared(questions, columns[number], columns[len(_ADAPTIVE) + number])
            rows.append({"budget": name, "merge_ratio": merge_ratio, "kinds": kinds})
    return rows


def table(report: dict[str, Any]) -> str:
    """Gains over the fixed budget in points, as Markdown."""
    kinds = list(report["rows"][0]["kinds"])
    rows = []
    for row in report["rows"]:
        held = row["kinds"][ALL_KINDS]["held"]
        shares = f"{held['adaptive']:.0%}, fixed {held['fixed']:.0%}"
        gains = [interval(row["kinds"][kind]["gain"]) for kind in kinds]
        rows.append([row["budget"], f"{row['merge_ratio']:g}", shares, *gains])
    head = ["budget", "merge_ratio", "holds", *kinds]
    return f"{markdown(head, rows)}\n\n{report['data']['num_questions']:,} questions; points, with 95 % intervals."


def main() -> None:
    """Ask, write, tell."""
    parser = options(__doc__, "pictures/adaptive.json")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--model", help="folder; default: the embedded model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.model)
    with TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), arguments.questions, 0, PICTURES))
        found = {"model": model.describe(), "data": describe_questions(questions), "rows": _rows(model, questions)}
    print(table(finish("adaptive", arguments.out, found)))


if __name__ == "__main__":
    main()
