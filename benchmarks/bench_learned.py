"""Trains what policies learn, on the embedded model, and compares it with choosing and merging at as many rows.

    python -m benchmarks.bench_learned [--questions 2000] [--learn-from 12000] [--files out/learned] [--guide out/guide]
        [--out FILE]

Questions to learn from are of the training split, others of the held-out one. A compressor that is in `--files` is not
trained again; the guide must be there (training/README.md). Nothing here is a time.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from safetensors import safe_open

from benchmarks.held_out import held_out
from benchmarks.report import command_line, finish, markdown, points
from training.heldout import write_held_out
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import ALL_KINDS, Question
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import UNTRIMMED_POLICY, Row
from trimserve.model.json_object import read_json
from trimserve.model.loading import describe_model, load_model
from trimserve.model.trained_file import save_trained, shape_of
from trimserve.trimming.policies.tokenpacker import TokenPackerRows

__all__ = ["main", "table"]

_ROWS: Final = {
    "11": {"quecc": 7, "tokenpacker": 7, "flashsloth": 7, "registers": 7, "wico": 7},
    "22": {"quecc": 14, "tokenpacker": 14, "flashsloth": 14, "registers": 14, "wico": 13},
}
"""Rows of a tile of 65 features, by the percentage that they are at most; windows come to 13."""

_MERGED: Final = {"11": (0.016, 0.09), "22": (0.12, 0.09)}
"""What stays of an image and what the rest is merged into, together about as many rows."""

_CHOOSING: Final = ("cls", "vispruner", "gprune", "trimmed", "guided", "sparsevlm", "mmr")
_ROUTER: Final = "exit"
_UNTRAINED: Final = "tokenpacker"
"""Every method that groups alike patches is the same before training."""
_STEPS: Final = 125
_SEED: Final = 1
"""Of the questions to learn from."""


def table(report: dict[str, Any]) -> str:
    """What trained rows answer beside choosing and merging, the best first, as Markdown."""
    tables = []
    for share, rows in report["rows"].items():
        [untrimmed] = (row for row in rows if row["policy"] == UNTRIMMED_POLICY)
        lines = [_line(row, report["trained"]) for row in rows if row["policy"] not in (UNTRIMMED_POLICY, _ROUTER)]
        head = ["policy", "holds", "exact match", "beside untrimmed, points", "KL", "weights", "loss"]
        asked = f"{report['questions']:,} questions, untrimmed {untrimmed['accuracy']:.1%}"
        tables.append(f"About {share} % of the rows; {asked}:\n\n{markdown(head, lines)}")
    return "\n\n".join([*tables, *_exit_told(report), _guide_told(report["guide"])])


def _exit_told(report: dict[str, Any]) -> Iterator[str]:
    """A sentence on the router, which makes no rows."""
    routers = [each for each in report["trained"] if each["method"] == _ROUTER]
    for row in (row for row in report["rows"]["11"] if row["policy"] == _ROUTER):
        told = f"`exit`, which holds all rows of the first layer: {row['accuracy']:.1%}, KL {row['divergence']:.3f}"
        yield f"{told}; {routers[0]['weights']:,} weights, loss {_loss(routers[0])}."


def _guide_told(guide: dict[str, Any]) -> str:
    """A sentence on the guide."""
    size = f"{guide['weights']:,} weights, {guide['steps']:,} steps of training"
    return f"The guide of `guided`: {size}; by itself it answers {guide['accuracy']:.1%}."


def _line(row: dict[str, Any], trained: Sequence[dict[str, Any]]) -> list[str]:
    size = [each for each in trained if (each["method"], each["rows"]) == (row["policy"], row["rows"])]
    learned = [f"{size[0]['weights']:,}", _loss(size[0])] if size else ["", ""]
    change = points(row["change"], *row["change_interval"])
    name = row["name"] if row["policy"] == "untrained" else f"`{row['name']}`{', merged' if row['merge_ratio'] else ''}"
    return [name, f"{row['held']:.1%}", f"{row['accuracy']:.1%}", change, f"{row['divergence']:.3f}", *learned]


def _loss(trained: dict[str, Any]) -> str:
    return f"{trained['loss_before']:.3f} → {trained['loss_after']:.3f}"


def main() -> None:
    """Train, ask, write."""
    options = {"questions": 2000, "learn_from": 12000, "files": Path("out/learned"), "guide": Path("out/guide")}
    arguments = command_line(__doc__, "policies/learned.json", **options)
    router = _trained(arguments, _ROUTER, 0)
    trained, rows = [_card(router)], {}
    with held_out(arguments.questions) as questions:
        for share, methods in _ROWS.items():
            files = [_trained(arguments, method, number) for method, number in methods.items()]
            trained += map(_card, files)
            rows[share] = _asked(share, questions, (*files, router), arguments.guide)
        guide = _guide(arguments.guide, questions)
    counts = {"questions": arguments.questions, "learned_from": arguments.learn_from}
    print(table(finish(arguments, {**counts, "trained": trained, "guide": guide, "rows": rows})))


def _asked(share: str, questions: Sequence[Question], files: tuple[Path, ...], guide: Path) -> list[dict[str, Any]]:
    """What every policy comes to, the best first."""
    answerer = InProcess(load_model(ModelConfig(compressor=files, guide_model=str(guide)), EngineConfig()))
    report = measure_curve(answerer, questions, [*_trims(share)])
    rows = [_figures(row, _ROWS[share].get(row.policy, 0)) for row in report.rows if row.kind == ALL_KINDS]
    return sorted([*rows, _untrained(share, questions)], key=lambda row: -row["accuracy"])


def _untrained(share: str, questions: Sequence[Question]) -> dict[str, Any]:
    """What the means of alike patches come to, which training starts from."""
    info = describe_model(ModelConfig(), EngineConfig())
    module = TokenPackerRows(shape_of(info, _ROWS[share][_UNTRAINED]))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        save_trained(file, _UNTRAINED, module, info, "inputs", [], {})
        answerer = InProcess(load_model(ModelConfig(compressor=(file,)), EngineConfig()))
        report = measure_curve(answerer, questions, [TrimRequest(policy=_UNTRAINED)])
    [row] = (row for row in report.rows if (row.policy, row.kind) == (_UNTRAINED, ALL_KINDS))
    return {**_figures(row, 0), "policy": "untrained", "name": "means of alike patches"}


def _guide(folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """How large the guide is, and what it answers by itself."""
    model, about = load_model(ModelConfig(model=str(folder)), EngineConfig()), read_json(folder / "trimserve.json")
    report = measure_curve(InProcess(model), questions, [TrimRequest(k_ratio=1.0)])
    [row] = (row for row in report.rows if (row.policy, row.kind) == (UNTRIMMED_POLICY, ALL_KINDS))
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        size = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118  # no mapping
    steps = {"weights": size, "steps": about["training_steps"]}
    return {**steps, "accuracy": row.accuracy.value, "interval": [row.accuracy.low, row.accuracy.high]}


def _figures(row: Row, rows: int) -> dict[str, Any]:
    return {
        "policy": row.policy,
        "name": row.name,
        "rows": rows,
        "merge_ratio": row.merge_ratio,
        "held": row.kept_fraction,
        "accuracy": row.accuracy.value,
        "interval": [row.accuracy.low, row.accuracy.high],
        "change": row.accuracy_change.value,
        "change_interval": [row.accuracy_change.low, row.accuracy_change.high],
        "divergence": row.divergence.value,
    }


def _trims(share: str) -> Iterator[TrimRequest]:
    """Learned rows, then choosing and merging."""
    for method in (*_ROWS[share], "pool", _ROUTER):
        yield TrimRequest(policy=method)
    kept, merged = _MERGED[share]
    for policy in _CHOOSING:
        yield TrimRequest(policy=policy, budget=FixedRatio(kept), merge_ratio=merged)
    whole = FixedRatio(int(share) / 100)
    yield TrimRequest(policy="visiondrop", budget=whole)
    yield TrimRequest(policy="sparsevlm", budget=whole, parameters={"recycle_ratio": 1.0})


def _trained(arguments: argparse.Namespace, method: str, rows: int) -> Path:
    """The file of a method, trained now if it is not there."""
    file: Path = arguments.files / f"{method}-{rows}.safetensors"
    if not file.exists():
        data = arguments.files / "train" / "questions.jsonl"
        if not data.exists():
            write_held_out(data.parent, arguments.learn_from, _SEED, split="train")
        asked = ["--method", method, "--rows", rows, "--steps", _STEPS, "--num-threads", arguments.threads]
        places = ["--data", data, "--cache", arguments.files / "cache", "--out", file]
        command = [sys.executable, "-m", "trimserve", "train-compressor", *map(str, (*asked, *places))]
        subprocess.run(command, check=True)
    return file


def _card(file: Path) -> dict[str, Any]:
    """What a training came to."""
    with safe_open(file, framework="pt") as content:
        card = json.loads(content.metadata()["trimserve"])
        sizes = [content.get_tensor(name).numel() for name in content.keys()]  # noqa: SIM118  # no mapping
    (_, before), (_, after) = card["curve"][0], card["curve"][-1]
    told = {"method": card["method"], "rows": card["rows"], "steps": card["training"]["steps"]}
    return {**told, "weights": sum(sizes), "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    main()
