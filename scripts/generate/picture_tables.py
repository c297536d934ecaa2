"""The table of docs/pictures.md that `trimserve eval` measured: what trimming costs each kind of picture."""

from dataclasses import asdict

from benchmarks.report import markdown, points
from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["cost_by_picture"]


def cost_by_picture(report: Report) -> str:
    """Points from untrimmed for each kind of picture, policy and budget, as Markdown.

    Args:
        report: of `trimserve eval --keep`, whose kinds of questions are kinds of pictures.
    """
    keeps = sorted({row.keep for row in report.rows if row.keep is not None})
    data = report.data
    asked = f"{data['num_questions']:,} questions about {data['num_images']:,} pictures; points, with 95 % intervals."
    tables = [asked]
    for kind in (ALL_KINDS, *data["kinds"]):
        rows = [row for row in report.rows if row.kind == kind]
        [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
        ways = dict.fromkeys((row.name, row.merge_ratio) for row in rows if row is not untrimmed)
        lines = [
            [_name(*way), *_cells([row for row in rows if (row.name, row.merge_ratio) == way], keeps)] for way in ways
        ]
        accuracy = f"{untrimmed.accuracy.value:.1%} [{untrimmed.accuracy.low:.0%}, {untrimmed.accuracy.high:.0%}]"
        tables.append(f"**{kind}**: {untrimmed.num_questions} questions, untrimmed {accuracy}")
        tables.append(markdown(["policy", *(f"keeps {keep:.0%}" for keep in keeps)], lines))
    return "\n\n".join(tables)


def _name(policy: str, merge_ratio: float) -> str:
    return f"`{policy}`, merged" if merge_ratio else f"`{policy}`"


def _cells(rows: list[Row], keeps: list[float]) -> list[str]:
    changes = {row.keep: points(**asdict(row.accuracy_change)) for row in rows}
    return [changes.get(keep, "") for keep in keeps]
