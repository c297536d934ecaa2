"""Looks for the parameters with which policies answer best, on questions of their own.

    python -m benchmarks.tune_policies [--questions 600] [--seed 1] [--out FILE]

Every combination of a policy's candidates is tried at every budget, and what is not kept is dropped. The questions are
drawn with another seed than those that policies are compared on, so that nobody is compared on what it was tuned on.
The report has what every combination came to, and each policy's best: the largest mean of its accuracies, of equal
ones its defaults, then the one that was tried first. The last lines are what `trimserve eval --policies` takes.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from benchmarks.serve.report import write_json
from training.heldout import write_held_out
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import ALL_KINDS, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.progress import progress
from trimserve.evaluation.report import Report, variant
from trimserve.model.loading import load_model

__all__ = ["CANDIDATES", "main", "tuned"]

CANDIDATES: Final[Mapping[str, Mapping[str, Sequence[float]]]] = {
    "vispruner": {"layer": (1, 2, 3, 4, 5, 6), "important_ratio": (0.0, 0.25, 0.5, 0.75, 1.0)},
    "cdpruner": {"relevance_power": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)},
}
"""What is tried of each parameter; layers are those of the embedded model's vision encoder."""

_OUT = Path(__file__).parent / "results" / "policies" / "tuning.json"
_CONTROL = "random"
_KEEP = (0.11, 0.22, 0.33, 0.5)


def main() -> None:
    """Try, write, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1, help="of the questions; those of the comparison have 0")
    parser.add_argument("--threads", type=int, default=1, help="of one op")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = InProcess(load_model(ModelConfig(), EngineConfig()))
    with TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), arguments.questions, arguments.seed))
        with progress("questions", len(questions)) as advance:
            report = measure_curve(model, questions, list(_trims()), on_question=advance)
    found = tuned(report)
    tried = [
        {"policy": row.name, "keep": row.keep, "accuracy": row.accuracy.value}
        for row in report.rows
        if row.kind == ALL_KINDS
    ]
    about = {"seed": arguments.seed, "run": report.run, "model": report.model, "data": report.data}
    write_json({"benchmark": "tuning", **about, "tuned": found, "tried": tried}, arguments.out)
    for each in found:
        print(variant(each["policy"], each["parameters"]))


def tuned(report: Report) -> list[dict[str, Any]]:
    """The best parameters of each policy: policy, parameters, and the mean accuracies with them and by default.

    Args:
        report: of every combination of a policy's candidates, all at the same budgets.
    """
    found = []
    for policy in CANDIDATES:
        rows = [row for row in report.rows if (row.policy, row.kind) == (policy, ALL_KINDS)]
        accuracies: dict[str, list[float]] = {}
        for row in rows:
            accuracies.setdefault(row.name, []).append(row.accuracy.value)
        means = {name: sum(values) / len(values) for name, values in accuracies.items()}
        parameters = {row.name: row.parameters for row in rows}
        best = max(means, key=means.__getitem__)  # the first of equal ones; defaults were tried first
        found.append(
            {"policy": policy, "parameters": parameters[best], "accuracy": means[best], "by_default": means[policy]}
        )
    return found


def _trims() -> Iterator[TrimRequest]:
    """The control, every policy as it is by default, and every combination of its candidates, at every budget."""
    settings: list[tuple[str, dict[str, float]]] = [(_CONTROL, {})]
    for policy, candidates in CANDIDATES.items():
        settings.append((policy, {}))
        settings += [(policy, dict(zip(candidates, values, strict=True))) for values in product(*candidates.values())]
    for policy, parameters in settings:
        for share in _KEEP:
            yield TrimRequest(policy=policy, parameters=parameters, budget=FixedRatio(share))


if __name__ == "__main__":
    main()
