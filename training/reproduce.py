"""Checks that the committed evaluation can be had again: `python -m training.reproduce`.

Measures some of its settings anew, on the same held-out questions, and compares: every accuracy must lie within the
committed 95 % interval. The exit status is 1 if one does not.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.heldout import write_held_out
from training.readme import EVALUATION
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row
from trimserve.model.loading import describe_model, load_model

__all__ = ["compare", "main"]


def main() -> None:
    """Command line: measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=EVALUATION)
    committed = Report.from_json(parser.parse_args().report.read_text())
    info = describe_model(ModelConfig(), EngineConfig())
    settings = {(0.05, 0.0), (info.default_k_ratio, info.default_merge_ratio)}
    names = list(dict.fromkeys(row.policy for row in committed.rows if row.policy != UNTRIMMED_POLICY))
    trims = [TrimRequest(policy=name, k_ratio=k, merge_ratio=m) for name in names for k, m in sorted(settings)]
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        questions = load_questions(write_held_out(Path(folder), committed.data["num_questions"]))
        task = progress.add_task("questions", total=len(questions))
        model = InProcess(load_model(ModelConfig(), EngineConfig()))
        measured = measure_curve(model, questions, trims, on_question=lambda: progress.advance(task))
    table = Table("policy", "k_ratio", "merge_ratio", "kind", "committed [95 %]", "measured", box=None)
    failures = 0
    for was, now in compare(committed, measured):
        is_within = was.accuracy.low <= now.accuracy.value <= was.accuracy.high
        failures += not is_within
        interval = f"{was.accuracy.value:.1%} [{was.accuracy.low:.1%}, {was.accuracy.high:.1%}]"
        shown = f"{now.accuracy.value:.1%}" + ("" if is_within else "  outside")
        table.add_row(now.policy, f"{now.k_ratio:g}", f"{now.merge_ratio:g}", now.kind, interval, shown)
    Console().print(table)
    if failures:
        raise SystemExit(f"{failures} accuracies lie outside their intervals")


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


def _key(row: Row) -> tuple[str, float, float, str]:
    return row.policy, row.k_ratio, row.merge_ratio, row.kind


if __name__ == "__main__":
    main()
