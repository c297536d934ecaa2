"""Writes the tables of README.md from what was measured, so that no number there is typed by hand.

`python -m training.readme`, after `training.evaluate` and `trimserve eval`.
"""

import json
from pathlib import Path
from typing import Any

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = [
    "EVALUATION",
    "PICTURES",
    "SECOND_EDITION",
    "accuracy_table",
    "renew_readme",
    "second_edition_table",
    "trimming_table",
]

EVALUATION = Path(__file__).parent.parent / "benchmarks/results/trimming/report.json"
"""What `trimserve eval` measured on held-out questions."""

PICTURES = EVALUATION.parents[1] / "pictures/report.json"
"""What it measured on harder pictures."""

SECOND_EDITION = Path(__file__).parent / "second_edition"
"""What the second edition's training can go on from, with `scenes.json`: `trimserve eval` on the first's questions."""

_README = Path(__file__).parent / "README.md"
_REPORT = Path(__file__).parent / "report.json"


def renew_readme() -> None:
    """Put the tables between their markers."""
    text = _README.read_text()
    tables = {
        "accuracy": accuracy_table(json.loads(_REPORT.read_text())),
        "trimming": trimming_table(Report.from_json(EVALUATION.read_text())),
        "second edition": second_edition_table(
            json.loads(_REPORT.read_text()),
            Report.from_json((SECOND_EDITION / "scenes.json").read_text()),
            Report.from_json(PICTURES.read_text()),
        ),
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


def second_edition_table(first: dict[str, Any], scenes: Report, pictures: Report) -> str:
    """Exact match of the second edition as far as it is, beside what it has to reach, as Markdown.

    Args:
        first: what `report.json` holds: the shipped model.
        scenes: of the second edition on the first's questions.
        pictures: of the second edition on all kinds of pictures.
    """
    lines = ["| Kind | Questions | Second edition [95 %] | To reach |", "|---|---:|---:|---:|"]
    of_first = {kind: right - 0.01 for kind, right in first["accuracy"].items()}
    of_first[ALL_KINDS] = of_first.pop("overall")
    of_pictures = dict.fromkeys(("busy", "object", "page", "chart"), 0.8)
    for report, bars in ((scenes, of_first), (pictures, of_pictures)):
        for row in report.rows:
            if row.policy == UNTRIMMED_POLICY and row.kind in bars:
                name = "overall" if row.kind == ALL_KINDS else row.kind
                interval = f"[{row.accuracy.low:.0%}, {row.accuracy.high:.0%}]"
                lines.append(f"| {name} | {row.num_questions} | {_percent(row)} {interval} | {bars[row.kind]:.1%} |")
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
