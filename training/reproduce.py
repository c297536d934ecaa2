"""Checks that a committed evaluation can be had again: `python -m training.reproduce`.

Measures some of its settings anew, on the same held-out questions, and compares: every accuracy must lie within the
committed 95 % interval. The exit status is 1 if one does not. `--report` takes the one about harder pictures as well,
with the `--model` that it is about.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.examples import PICTURES
from training.heldout import held_out
from training.readme import EVALUATION
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row
from trimserve.model.loading import describe_model, load_model

__all__ = ["compare", "main"]

_KEEP = 0.22
"""Of the budgets that are shares of the image, the one that is measured again."""


def main() -> None:
    """Command line: measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=EVALUATION)
    parser.add_argument("--model", help="folder; default: the embedded model")
    arguments = parser.parse_args()
    committed = Report.from_json(arguments.report.read_text())
    config = ModelConfig(model=arguments.model, dtype="float32")
    pictures = PICTURES if {*committed.data["kinds"]} <= {*PICTURES} else ()
    trims = list(_some_settings(committed, config))
    num_questions = committed.data["num_questions"]
    with held_out(num_questions, pictures) as questions, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("questions", total=len(questions))
        model = InProcess(load_model(config, EngineConfig()))
        measured = measure_curve(model, questions, trims, on_question=lambda: progress.advance(task))
    table = Table("policy", "budget", "merge_ratio", "kind", "committed [95 %]", "measured", box=None)
    failures = 0
    for was, now in compare(committed, measured):
        is_within = was.accuracy.low <= now.accuracy.value <= was.accuracy.high
        failures += not is_within
        interval = f"{was.accuracy.value:.1%} [{was.accuracy.low:.1%}, {was.accuracy.high:.1%}]"
        shown = f"{now.accuracy.value:.1%}" + ("" if is_within else "  outside")
        table.add_row(now.name, f"{now.keep or now.k_ratio:g}", f"{now.merge_ratio:g}", now.kind, interval, shown)
    Console().print(table)
    if failures:
        raise SystemExit(f"{failures} accuracies lie outside their intervals")


def _some_settings(committed: Report, config: ModelConfig) -> Iterator[TrimRequest]:
    """One budget of a report that has shares of the image; of one that has budgets per head, two with their merging."""
    info = describe_model(config, EngineConfig())
    per_head = {(0.05, 0.0), (info.default_k_ratio, info.default_merge_ratio)}
    for row in committed.rows:
        if row.kind != ALL_KINDS or row.policy == UNTRIMMED_POLICY:
            continue
        wanted = TrimRequest(policy=row.policy, merge_ratio=row.merge_ratio, parameters=row.parameters)
        if row.keep == _KEEP:
            yield replace(wanted, budget=FixedRatio(_KEEP))
        elif row.keep is None and (row.k_ratio, row.merge_ratio) in per_head:
            yield replace(wanted, k_ratio=row.k_ratio)


def compare(committed: Report, measured: Report) -> Iterator[tuple[Row, Row]]:
    """Pair each measured row with the committed one of the same setting and kind.

    Args:
        committed: what was measured before.
        measured: what was measured now.
    Raises:
        KeyError: a setting or kind that was never committed.
    """
    rows = {_key(row): row for row in committed.rows}
    return ((rows[_key(row)], row) for row in measured.rows)


def _key(row: Row) -> tuple[str, float, float | None, float, str]:
    return row.name, row.k_ratio, row.keep, row.merge_ratio, row.kind


if __name__ == "__main__":
    main()
