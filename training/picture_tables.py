"""Tables of README.md about harder pictures, from what `trimserve eval` and `benchmarks.bench_pictures` measured."""

from typing import Any

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["adaptive_table", "background_sentence", "cost_by_picture"]


def cost_by_picture(report: Report) -> str:
    """What trimming changes for each kind of picture, in points, at each budget, as Markdown.

    Args:
        report: of `trimserve eval --keep`, whose kinds of questions are kinds of pictures.
    """
    rows = [row for row in report.rows if row.kind != ALL_KINDS]
    keeps = sorted({row.keep for row in rows if row.keep is not None})
    head = " | ".join(f"keeps {keep:.0%}" for keep in keeps)
    lines = [f"| Picture | Policy | {head} |", f"|---|---|{'---:|' * len(keeps)}"]
    for kind, number in report.data["kinds"].items():
        of_kind = [row for row in rows if row.kind == kind]
        [untrimmed] = (row for row in of_kind if row.policy == UNTRIMMED_POLICY)
        lines.append(f"| **{kind}** | untrimmed {untrimmed.accuracy.value:.1%} of {number} |{' |' * len(keeps)}")
        names = dict.fromkeys((row.name, row.merge_ratio) for row in of_kind if row is not untrimmed)
        for name, merge_ratio in names:
            cells = {row.keep: _change(row) for row in of_kind if (row.name, row.merge_ratio) == (name, merge_ratio)}
            shown = f"`{name}`{', merged' if merge_ratio else ''}"
            lines.append(f"| | {shown} | {' | '.join(cells.get(keep, '') for keep in keeps)} |")
    return "\n".join(lines)


def adaptive_table(report: dict[str, Any]) -> str:
    """Adaptive budgets beside fixed ones that keep as much on average, as Markdown.

    Args:
        report: `adaptive.json` of `benchmarks.bench_pictures`.
    """
    kinds = list(report["rows"][0]["kinds"])
    lines = [f"| Budget | merge_ratio | Held | {' | '.join(kinds)} |", f"|---|---:|---:|{'---:|' * len(kinds)}"]
    for row in report["rows"]:
        held = row["kinds"][ALL_KINDS]["held"]
        gains = " | ".join(_interval(row["kinds"][kind]["gain"]) for kind in kinds)
        share = f"{held['adaptive']:.0%}, fixed {held['fixed']:.0%}"
        lines.append(f"| {row['budget']} | {row['merge_ratio']:g} | {share} | {gains} |")
    return "\n".join(lines)


def background_sentence(report: dict[str, Any]) -> str:
    """How much of what is answered was read from the photograph.

    Args:
        report: `backgrounds.json` of `benchmarks.bench_pictures`.
    """
    data = report["data"]
    return (
        f"{data['num_questions']:,} questions about {data['num_images']:,} busy scenes: {report['own']['value']:.1%} "
        f"right on one background, {report['other']['value']:.1%} on another, a change of "
        f"{_interval(report['change'])} points; {report['differing']['value']:.1%} of the answers differ."
    )


def _change(row: Row) -> str:
    change = row.accuracy_change
    return _interval({"value": change.value, "low": change.low, "high": change.high})


def _interval(estimate: dict[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.0f}, {high:+.0f}]"
