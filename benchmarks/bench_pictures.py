"""Pictures whose background is not empty: what adaptive budgets are worth, and whether answers come from the object.

    python -m benchmarks.bench_pictures [--questions 1000] [--model DIR] [--out DIR]

Held-out questions about every kind of picture, answered greedily in this process. `adaptive.json`: budgets that differ
from image to image, `top_p` and `knee`, beside a fixed one that keeps the same mean share of the features; differences
are paired. `backgrounds.json`: busy scenes asked about twice, on two photographs. Times are not measured, so a busy
machine does no harm.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import about
from benchmarks.report import options, write_json
from training.backgrounds import BACKGROUNDS, write_backgrounds
from training.examples import PICTURES
from training.heldout import write_held_out
from trimserve.api.trim import Budget, FixedRatio, Knee, TopP, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.metrics import Bootstrap, is_match
from trimserve.evaluation.progress import progress
from trimserve.model.loading import load_model

__all__ = ["ADAPTIVE", "adaptive_rows", "background_figures", "main"]

ADAPTIVE: Final[dict[str, Budget]] = {
    "top_p 0.5": TopP(0.5),
    "top_p 0.7": TopP(0.7),
    "top_p 0.9": TopP(0.9),
    "knee": Knee(),
}
"""Budgets that differ from image to image."""

_MERGE_RATIOS = (0.0, 0.1)


def main() -> None:
    """Ask, write."""
    parser = options(__doc__, "pictures")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--model", help="folder; default: the embedded model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = InProcess(load_model(ModelConfig(model=arguments.model), EngineConfig()))
    run = {**about(1), "model": model.describe()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = write_backgrounds(folder / "backgrounds", arguments.questions // 2)
        own, other = (load_questions(files[background]) for background in BACKGROUNDS)
        answers = [[answer for [answer] in _ask(model, asked, [])] for asked in (own, other)]
        figures = background_figures(own, *answers)
        write_json({**run, "data": describe_questions(own), **figures}, arguments.out / "backgrounds.json")
        questions = load_questions(write_held_out(folder / "pictures", arguments.questions, 0, PICTURES))
        document = {**run, "data": describe_questions(questions), "rows": _adaptive(model, questions)}
        write_json(document, arguments.out / "adaptive.json")


def background_figures(
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
    on_own, on_other = _is_right(questions, own), _is_right(questions, other)
    differs = np.array([one.text != two.text for one, two in zip(own, other, strict=True)], float)
    bootstrap = _bootstrap(questions)
    found = {"own": on_own, "other": on_other, "change": on_other - on_own, "differing": differs}
    return {name: asdict(bootstrap.mean(values)) for name, values in found.items()}


def adaptive_rows(
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
    right = {name: _is_right(questions, answers) for name, answers in both.items()}
    held = {name: np.array([each.num_held / each.num_valid for each in answers]) for name, answers in both.items()}
    kinds = np.array([question.kind for question in questions])
    bootstrap = _bootstrap(questions)
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


def _adaptive(model: InProcess, questions: Sequence[Question]) -> list[dict[str, Any]]:
    wanted = [TrimRequest(budget=budget) for budget in ADAPTIVE.values()]
    kept = np.array(
        [[each.num_held / each.num_valid for each in answers[1:]] for answers in _ask(model, questions, wanted, 1)]
    ).mean(axis=0)
    rows = []
    for merge_ratio in _MERGE_RATIOS:
        adaptive = [replace(trim, merge_ratio=merge_ratio) for trim in wanted]
        fixed = [replace(trim, budget=FixedRatio(float(share))) for trim, share in zip(adaptive, kept, strict=True)]
        columns = list(zip(*_ask(model, questions, [*adaptive, *fixed]), strict=True))[1:]
        for number, name in enumerate(ADAPTIVE):
            compared = adaptive_rows(questions, columns[number], columns[len(ADAPTIVE) + number])
            about = {"budget": name, "merge_ratio": merge_ratio, "fixed_ratio": round(float(kept[number]), 4)}
            rows.append({**about, "kinds": compared})
    return rows


def _ask(
    model: InProcess, questions: Sequence[Question], trims: Sequence[TrimRequest], max_new_tokens: int | None = None
) -> list[list[Answer]]:
    with progress("questions", len(questions)) as advance:
        found = []
        for answers in model.answers(questions, trims, max_new_tokens=max_new_tokens):
            found.append(answers)
            advance()
    return found


def _is_right(questions: Sequence[Question], answers: Sequence[Answer]) -> NDArray[np.float64]:
    return np.array(
        [is_match(answer.text, q.answer or "") for answer, q in zip(answers, questions, strict=True)], float
    )


def _bootstrap(questions: Sequence[Question]) -> Bootstrap:
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions))}
    return Bootstrap(np.array([numbers[question.image] for question in questions]))


if __name__ == "__main__":
    main()
