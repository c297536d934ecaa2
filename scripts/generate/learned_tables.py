"""The table of docs/policies.md that sets trained policies beside the others, made from what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.generate.policy_tables import percent
from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["learned_by_rows"]

_TILE = 65
"""Features of the embedded model's tile."""

_ROUNDING = 0.005


def learned_by_rows(reports: Mapping[str, Report], training: dict[str, Any]) -> str:
    """What trained rows answer beside choosing and merging at as many rows, as Markdown; the best first.

    Args:
        reports: of `train_policies`, by the share of the rows in percent.
        training: what training came to.
    """
    trained = {(each["method"], each["rows"]): each for each in training["trained"]}
    tables = []
    for share, report in reports.items():
        rows = [row for row in report.rows if row.kind == ALL_KINDS]
        [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
        asked = f"{report.data['num_questions']:,} questions about {report.data['num_images']:,} images"
        lines = [
            f"About {share} % of the rows; {asked}, untrimmed {percent(untrimmed)}:",
            "",
            "| policy | holds | exact match | beside untrimmed | KL | weights | loss, nats |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            _learned_line(row, [each for (name, _), each in trained.items() if name == row.policy])
            for row in sorted(rows, key=lambda row: -row.accuracy.value)
            if row.policy not in (UNTRIMMED_POLICY, "exit")
        ]
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, _exit_told([*reports.values()], trained)])


def _learned_line(row: Row, trained: Sequence[dict[str, Any]]) -> str:
    change = row.accuracy_change
    cells = [
        f"`{row.name}`{', merged' if row.merge_ratio else ''}",
        f"{row.kept_fraction:.1%}",
        percent(row),
        f"{100 * change.value:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        f"{row.divergence.value:.3f}",
    ]
    size = [each for each in trained if abs(each["rows"] / _TILE - row.kept_fraction) < _ROUNDING]
    cells += (
        [f"{size[0]['weights']:,}", f"{size[0]['loss_before']:.3f} → {size[0]['loss_after']:.3f}"] if size else ["", ""]
    )
    return f"| {' | '.join(cells)} |"


def _exit_told(reports: Sequence[Report], trained: dict[Any, Any]) -> str:
    rows = [row for report in reports for row in report.rows if (row.policy, row.kind) == ("exit", ALL_KINDS)]
    [router] = (each for (name, _), each in trained.items() if name == "exit")
    return (
        f"`exit`, which leaves layers out and drops nothing of the first: {percent(rows[0])}, "
        f"{router['weights']:,} weights, loss {router['loss_before']:.3f} → {router['loss_after']:.3f}."
    )
