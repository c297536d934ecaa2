"""Tables of docs/policies.md: what every policy costs in accuracy, made from what `trimserve eval` found."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.report import markdown
from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Advantage, Report, Row, variant
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.table import POLICIES

__all__ = [
    "CONTROL",
    "accuracy_by_kind",
    "accuracy_by_policy",
    "parameters_found",
    "percent",
]

CONTROL = "random"
"""With which every policy is compared."""


def accuracy_by_policy(report: Report) -> str:
    """Exact match over all questions by policy and budget, what is not kept dropped and merged, as Markdown.

    Args:
        report: of `trimserve eval --policies all`.
    """
    rows = [row for row in report.rows if row.kind == ALL_KINDS]
    [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
    data = report.data
    asked = f"{data['num_questions']:,} questions about {data['num_images']:,} images, untrimmed {percent(untrimmed)}."
    signs = f"▲ and ▼: better and worse than `{CONTROL}` at the same budget, by the 95 % interval of the difference."
    tables = [f"{asked} {signs}"]
    for merge_ratio in sorted({row.merge_ratio for row in rows}):
        title = f"merged, `merge_ratio` {merge_ratio:g}" if merge_ratio else "dropped"
        tables.append(f"What is not kept is {title}:")
        tables.append(_by_budget(report.compared(merge_ratio), report.advantages, _with_sign))
    return "\n\n".join(tables)


def accuracy_by_kind(report: Report) -> str:
    """Exact match with its 95 % interval, one table for each kind of question, what is not kept dropped, as Markdown.

    Args:
        report: of `trimserve eval --policies all`.
    """
    tables = []
    for kind, number in report.data["kinds"].items():
        rows = [row for row in report.rows if row.kind == kind and not row.merge_ratio]
        [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
        tables += [
            f"<details markdown><summary>{kind}: {number} questions, untrimmed {percent(untrimmed)}</summary>",
            _by_budget(rows, report.advantages, _with_interval),
            "</details>",
        ]
    return "\n\n".join(tables)


def parameters_found(*calibrations: dict[str, Any]) -> str:
    """Parameters that logits speak for, as Markdown.

    Args:
        *calibrations: of `trimserve eval --calibrate --keep`.
    """
    rows = []
    for calibration in calibrations:
        field, measure = _MEASURES[calibration["by"]]
        usual, *_ = probes = calibration["probes"]
        [best] = (probe for probe in probes if probe["parameters"] == calibration["parameters"])
        asked = f"{measure}, mean over budgets, {calibration['data']['num_questions']:,} questions"
        name = variant(calibration["policy"], calibration["parameters"])
        rows.append([f"`{name}`", asked, f"{usual[field]:.3f}", f"{best[field]:.3f}"])
    return markdown(["policy", "best by", "by default", "so"], rows, words=2)


_MEASURES = {"cosine": ("similarity", "cosine of the logits"), "kl": ("divergence", "KL, nats")}

_Cell = Callable[[Row, Advantage | None], str]
"""What is told of a row, and of the control's lead over it."""


def _by_budget(rows: Iterable[Row], advantages: Iterable[Advantage], cell: _Cell) -> str:
    """Policies down, budgets across; a policy that takes no budget has one cell, named by what it held."""
    found = {(row.name, row.keep): row for row in rows if row.policy != UNTRIMMED_POLICY}
    budgets = sorted({keep for _, keep in found if keep is not None})
    gains = {(gain.name, gain.keep, gain.merge_ratio, gain.kind): gain for gain in advantages if gain.policy == CONTROL}
    lines = []
    for name, policy in {row.name: row.policy for row in found.values()}.items():
        looks_at = "image" if issubclass(POLICIES[policy], BeforeDecoder) else "question"
        looks_at = "nothing" if policy in (CONTROL, "strided") else looks_at
        if (name, None) in found:
            alone = found[name, None]
            cells = [f"{cell(alone, None)}, holds {alone.kept_fraction:.0%}", *[""] * (len(budgets) - 1)]
        else:
            of_policy = [found[name, keep] for keep in budgets]
            cells = [cell(row, gains.get((name, row.keep, row.merge_ratio, row.kind))) for row in of_policy]
        lines.append([f"`{name}`", looks_at, *cells])
    return markdown(["policy", "looks at", *(f"keeps {keep:.0%}" for keep in budgets)], lines, words=2)


def _with_sign(row: Row, lead: Advantage | None) -> str:
    """The accuracy, and whether the control's lead is certainly below or above 0."""
    sign = ""
    if lead is not None:
        sign = " ▲" if lead.accuracy.high < 0 else " ▼" if lead.accuracy.low > 0 else ""
    return f"{percent(row)}{sign}"


def _with_interval(row: Row, lead: Advantage | None) -> str:
    return f"{_with_sign(row, lead)} [{row.accuracy.low:.0%}, {row.accuracy.high:.0%}]"


def percent(row: Row) -> str:
    """Its accuracy, as a cell."""
    return f"{row.accuracy.value:.1%}"
