"""Writes the tables of README.md from what was measured, so that no number there is typed by hand.

`python -m training.readme`, after `training.evaluate` and `trimserve eval`.
"""

import json
from pathlib import Path
from typing import Any

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["EVALUATION", "accuracy_table", "renew_readme", "trimming_table"]

EVALUATION = Path(__file__).parent.parent / "benchmarks/results/trimming/report.json"
"""What `trimserve eval` measured on held-out questions."""

_README = Path(__file__).parent / "README.md"
_REPORT = Path(__file__).parent / "report.json"


def renew_readme() -> None:
    """Put the tables between their markers."""
    text = _README.read_text()
    tables = {
        "accuracy": accuracy_table(json.loads(_REPORT.read_text())),
        "trimming": trimming_table(Report.from_json(EVALUATION.read_text())),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    _README.write_text(text)


def accuracy_table(report: dict[str, Any]) -> str:
    """Exact match by kind of question, with and without the image, as Markdown.

    Args:
        report: what `report.json` holds.
    """
    lines = ["| Kind | Questions | Exact match | With a grey image |", "|---|---:|---:|---:|"]
    for kind, asked in report["questions"].items():
        right, grey = report["accuracy"][kind], report["accuracy_grey_image"][kind]
        lines.append(f"| {kind} | {asked} | {right:.1%} | {grey:.1%} |")
    return "\n".join(lines)


def trimming_table(evaluation: Report) -> str:
    """Exact match over all questions for each budget and policy, as Markdown.

    Args:
        evaluation: of the policies `trimmed`, `random` and `strided`.
    """
    rows = {(row.policy, row.merge_ratio, row.k_ratio): row for row in evaluation.rows if row.kind == ALL_KINDS}
    untrimmed = next(row for (policy, *_), row in rows.items() if policy == UNTRIMMED_POLICY)
    lines = [
        "| k_ratio | merge_ratio | kept_fraction | trimmed | random | strided | change when trimmed [95 %] | KL |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| untrimmed | | 100% | {_percent(untrimmed)} | | | | |",
    ]
    budgets = [(merge_ratio, k_ratio) for policy, merge_ratio, k_ratio in rows if policy == "trimmed"]
    for merge_ratio, k_ratio in sorted(budgets, key=lambda budget: (budget[0], -budget[1])):
        trimmed = rows["trimmed", merge_ratio, k_ratio]
        controls = " | ".join(_percent(rows[policy, merge_ratio, k_ratio]) for policy in ("random", "strided"))
        change = trimmed.accuracy_change
        interval = f"{100 * change.value:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        lines.append(
            f"| {k_ratio:g} | {merge_ratio:g} | {trimmed.kept_fraction:.0%} | {_percent(trimmed)} | {controls} "
            f"| {interval} | {trimmed.divergence.value:.3f} |"
        )
    return "\n".join(lines)


def _percent(row: Row) -> str:
    return f"{row.accuracy.value:.1%}"


if __name__ == "__main__":
    renew_readme()
