"""Tables of docs/policies.md: what every policy costs in accuracy and in time, made from what was measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Advantage, Report, Row, variant
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.table import POLICIES

__all__ = [
    "CONTROL",
    "MOST_OF_PREFILL",
    "RECOMMENDED",
    "accuracy_by_kind",
    "accuracy_by_policy",
    "later_layers",
    "learned_by_rows",
    "parameters_found",
    "speed_by_policy",
]

_TILE = 65
"""Features of the embedded model's tile."""

_ROUNDING = 0.005

CONTROL = "random"
"""With which every policy is compared."""

RECOMMENDED = ("trimmed", "cls")
"""What docs/policies.md tells people to switch on."""

MOST_OF_PREFILL = 0.05
"""Share that choosing may take of a recommended policy's prefill, the image's encoding included."""


def accuracy_by_policy(report: Report | None) -> str:
    """Exact match over all questions by policy and budget, what is not kept dropped and merged, as Markdown.

    Args:
        report: of `trimserve eval --policies all`; None says how to get one.
    """
    if report is None:
        return _missing("trimserve eval --policies all")
    rows = [row for row in report.rows if row.kind == ALL_KINDS]
    [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
    data = report.data
    asked = f"{data['num_questions']:,} questions about {data['num_images']:,} images, untrimmed {_percent(untrimmed)}."
    signs = f"▲ and ▼: better and worse than `{CONTROL}` at the same budget, by the 95 % interval of the difference."
    tables = [f"{asked} {signs}"]
    for merge_ratio in sorted({row.merge_ratio for row in rows}):
        title = f"merged, `merge_ratio` {merge_ratio:g}" if merge_ratio else "dropped"
        tables.append(f"What is not kept is {title}:")
        tables.append(_by_budget(report.compared(merge_ratio), report.advantages, _with_sign))
    return "\n\n".join(tables)


def accuracy_by_kind(report: Report | None) -> str:
    """Exact match with its 95 % interval, one table for each kind of question, what is not kept dropped, as Markdown.

    Args:
        report: of `trimserve eval --policies all`; None says how to get one.
    """
    if report is None:
        return _missing("trimserve eval --policies all")
    tables = []
    for kind, number in report.data["kinds"].items():
        rows = [row for row in report.rows if row.kind == kind and not row.merge_ratio]
        [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
        tables += [
            f"<details markdown><summary>{kind}: {number} questions, untrimmed {_percent(untrimmed)}</summary>",
            _by_budget(rows, report.advantages, _with_interval),
            "</details>",
        ]
    return "\n\n".join(tables)


def speed_by_policy(report: dict[str, Any] | None) -> str:
    """What choosing takes, by policy, as Markdown.

    Args:
        report: of `bench_policies`; None says how to get one.
    """
    if report is None:
        return _missing("python -m benchmarks.bench_policies")
    lines = [
        "| policy | 11B's shape, ms | memory, MiB | `bench`, ms | of a prefill | of one that encodes the image | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["policies"]:
        held, share = row["peak_extra_bytes"], row["share_with_encoding"]
        cells = (
            f"{1e3 * row['seconds']:,.1f}",
            "" if held is None else f"{held / 2**20:,.0f}",
            f"{1e3 * row['bench_seconds']:,.1f}",
            f"{row['share_of_prefill']:.1%}",
            f"{share:.1%}",
            "slow" if share > MOST_OF_PREFILL else "",
        )
        lines.append(f"| `{row['policy']}`{', merged' if row['merge_ratio'] else ''} | {' | '.join(cells)} |")
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['num_threads']} thread(s), torch {report['versions']['torch']}"
    set_aside = f"The engine sets {report['scratch_bytes'] / 2**20:,.0f} MiB aside for it at 11B's shape."
    return "\n".join([*lines, "", f"{where}. {set_aside}"])


def learned_by_rows(reports: Mapping[str, Report | None], training: dict[str, Any] | None) -> str:
    """What trained rows answer beside choosing and merging at as many rows, as Markdown; the best first.

    Args:
        reports: of `train_policies`, by the share of the rows in percent; None says how to get one.
        training: what training came to.
    """
    if training is None:
        return _missing("python -m benchmarks.train_policies")
    trained = {(each["method"], each["rows"]): each for each in training["trained"]}
    tables = []
    for share, report in reports.items():
        if report is None:
            return _missing("python -m benchmarks.train_policies")
        rows = [row for row in report.rows if row.kind == ALL_KINDS]
        [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
        asked = f"{report.data['num_questions']:,} questions about {report.data['num_images']:,} images"
        lines = [
            f"About {share} % of the rows; {asked}, untrimmed {_percent(untrimmed)}:",
            "",
            "| policy | holds | exact match | beside untrimmed | KL | weights | loss, nats |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        compared = [row for row in rows if row.policy not in (UNTRIMMED_POLICY, "exit")]
        for row in sorted(compared, key=lambda row: -row.accuracy.value):
            lines += [_learned_line(row, [each for (name, _), each in trained.items() if name == row.policy])]
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, _exit_told([*reports.values()], trained)])


def _learned_line(row: Row, trained: Sequence[dict[str, Any]]) -> str:
    change = row.accuracy_change
    cells = [
        f"`{row.name}`{', merged' if row.merge_ratio else ''}",
        f"{row.kept_fraction:.1%}",
        _percent(row),
        f"{100 * change.value:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        f"{row.divergence.value:.3f}",
    ]
    size = [each for each in trained if abs(each["rows"] / _TILE - row.kept_fraction) < _ROUNDING]
    cells += (
        [f"{size[0]['weights']:,}", f"{size[0]['loss_before']:.3f} → {size[0]['loss_after']:.3f}"] if size else ["", ""]
    )
    return f"| {' | '.join(cells)} |"


def _exit_told(reports: Sequence[Report | None], trained: dict[Any, Any]) -> str:
    rows = [row for report in reports if report for row in report.rows if (row.policy, row.kind) == ("exit", ALL_KINDS)]
    [router] = (each for (name, _), each in trained.items() if name == "exit")
    return (
        f"`exit`, which leaves layers out and drops nothing of the first: {_percent(rows[0])}, "
        f"{router['weights']:,} weights, loss {router['loss_before']:.3f} → {router['loss_after']:.3f}."
    )


def parameters_found(tuning: dict[str, Any] | None, calibrations: Sequence[dict[str, Any] | None]) -> str:
    """Parameters that right answers, or logits alone, speak for, as Markdown.

    Args:
        tuning: of `tune_policies`; None says how to get one.
        calibrations: of `trimserve eval --calibrate --keep`; None says how to get one.
    """
    if tuning is None:
        return _missing("python -m benchmarks.tune_policies")
    lines = ["| policy | best by | by default | so |", "|---|---|---:|---:|"]
    asked = f"exact match, mean over budgets, {tuning['data']['num_questions']:,} questions"
    for found in tuning["tuned"]:
        name = variant(found["policy"], found["parameters"])
        lines.append(f"| `{name}` | {asked} | {found['by_default']:.1%} | {found['accuracy']:.1%} |")
    for calibration in calibrations:
        if calibration is None:
            return _missing("trimserve eval --calibrate --policies vflowopt --keep")
        field, measure = _MEASURES[calibration["by"]]
        usual, *_ = probes = calibration["probes"]
        [best] = (probe for probe in probes if probe["parameters"] == calibration["parameters"])
        asked = f"{measure}, mean over budgets, {calibration['data']['num_questions']:,} questions"
        name = variant(calibration["policy"], calibration["parameters"])
        lines.append(f"| `{name}` | {asked} | {usual[field]:.3f} | {best[field]:.3f} |")
    return "\n".join(lines)


def later_layers(report: dict[str, Any] | None) -> str:
    """What it costs and saves that later cross-attention layers hold less, as Markdown.

    Args:
        report: of `bench_layers`; None says how to get one.
    """
    if report is None:
        return _missing("python -m benchmarks.bench_layers")
    lines = [
        "| policy | exact match | rows of each layer | KiB, pages of all layers | KiB, pages of one layer |",
        "|---|---:|---|---:|---:|",
    ]
    for row in report["rows"]:
        name = row["policy"] if row["policy"] == UNTRIMMED_POLICY else f"`{variant(row['policy'], row['parameters'])}`"
        rows = ", ".join(f"{held:,.0f}" for held in row["layer_rows"])
        cells = (f"{held / 2**10:,.0f}" for held in row["held_bytes"].values())
        lines.append(f"| {name} | {row['accuracy']:.1%} | {rows} | {' | '.join(cells)} |")
    asked = f"{report['questions']:,} questions; means over them. `sparsevlm` keeps {report['keep']:.0%} in the first"
    return "\n".join([*lines, "", f"{asked} layer, `todre` everything."])


_MEASURES = {"cosine": ("similarity", "cosine of the logits"), "kl": ("divergence", "KL, nats")}

_Cell = Callable[[Row, Advantage | None], str]
"""What is told of a row, and of the control's lead over it."""


def _by_budget(rows: Iterable[Row], advantages: Iterable[Advantage], cell: _Cell) -> str:
    """Policies down, budgets across; a policy that takes no budget has one cell, named by what it held."""
    found = {(row.name, row.keep): row for row in rows if row.policy != UNTRIMMED_POLICY}
    budgets = sorted({keep for _, keep in found if keep is not None})
    gains = {(gain.name, gain.keep, gain.merge_ratio, gain.kind): gain for gain in advantages if gain.policy == CONTROL}
    lines = [
        f"| policy | looks at | {' | '.join(f'keeps {keep:.0%}' for keep in budgets)} |",
        f"|---|---|{'---:|' * len(budgets)}",
    ]
    for name, policy in {row.name: row.policy for row in found.values()}.items():
        looks_at = "image" if issubclass(POLICIES[policy], BeforeDecoder) else "question"
        looks_at = "nothing" if policy in (CONTROL, "strided") else looks_at
        if (name, None) in found:
            alone = found[name, None]
            cells = [f"{cell(alone, None)}, holds {alone.kept_fraction:.0%}", *[""] * (len(budgets) - 1)]
        else:
            of_policy = [found[name, keep] for keep in budgets]
            cells = [cell(row, gains.get((name, row.keep, row.merge_ratio, row.kind))) for row in of_policy]
        lines.append(f"| `{name}` | {looks_at} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_sign(row: Row, lead: Advantage | None) -> str:
    """The accuracy, and whether the control's lead is certainly below or above 0."""
    sign = ""
    if lead is not None:
        sign = " ▲" if lead.accuracy.high < 0 else " ▼" if lead.accuracy.low > 0 else ""
    return f"{_percent(row)}{sign}"


def _with_interval(row: Row, lead: Advantage | None) -> str:
    return f"{_with_sign(row, lead)} [{row.accuracy.low:.0%}, {row.accuracy.high:.0%}]"


def _percent(row: Row) -> str:
    return f"{row.accuracy.value:.1%}"


def _missing(command: str) -> str:
    return f"Not measured yet: `{command}`."
