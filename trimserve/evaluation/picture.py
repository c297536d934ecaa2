"""Draws a report: accuracy and divergence against the kept fraction, and accuracy for each kind of question.

Needs matplotlib, which the extra `eval` brings; import it only where a picture is wanted.
"""

import math
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["draw_curves"]

_COLORS: Final = ("#0a6fb8", "#e07b28", "#6f9a3c", "#8a5fb0")
_INK: Final = "#2b2f36"
_COLUMNS: Final = 5
_ENDS: Final = ("low", "high")
_LEAST_DIVERGENCE: Final = 1e-5  # where the bands end on the logarithmic axis


def draw_curves(report: Report, path: Path) -> None:
    """Write the picture.

    The dashed line is the untrimmed accuracy. Bands are 95 % intervals: of the change from untrimmed, which is
    paired, and of the mean divergence.

    Args:
        report: what to draw.
        path: PNG to write.
    """
    kinds = list(dict.fromkeys(row.kind for row in report.rows if row.kind != ALL_KINDS))
    num_rows = math.ceil(len(kinds) / _COLUMNS)
    figure = Figure(figsize=(13, 5.2 + 2.5 * num_rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, 2 * _COLUMNS, height_ratios=[1.9, *[1.0] * num_rows])
    accuracy = figure.add_subplot(grid[0, :_COLUMNS])
    _draw_accuracy(accuracy, report, ALL_KINDS)
    accuracy.set_title("exact match, all questions; dashed: untrimmed", loc="left", fontsize=11)
    accuracy.legend(frameon=False, loc="lower right")
    divergence = figure.add_subplot(grid[0, _COLUMNS:])
    _draw_divergence(divergence, report)
    divergence.set_title("KL of the first token to untrimmed, nats; numbers: k_ratio", loc="left", fontsize=11)
    for index, kind in enumerate(kinds):
        column = 2 * (index % _COLUMNS)
        panel = figure.add_subplot(grid[1 + index // _COLUMNS, column : column + 2])
        _draw_accuracy(panel, report, kind)
        panel.set_title(f"{kind} ({_rows(report, UNTRIMMED_POLICY, kind)[0].num_questions})", loc="left", fontsize=10)
    model, data = report.model, report.data
    figure.suptitle(
        f"{model['model']} ({model['revision'][:12]}): {data['num_questions']:,} questions about "
        f"{data['num_images']:,} images; bands: 95 % intervals of the change",
        color=_INK,
        fontsize=11,
    )
    figure.supxlabel("kept fraction of the visual features", color=_INK, fontsize=11)
    figure.savefig(path)


def _rows(report: Report, policy: str, kind: str) -> list[Row]:
    rows = [row for row in report.rows if (row.policy, row.kind) == (policy, kind)]
    return sorted(rows, key=lambda row: row.kept_fraction)


def _policies(report: Report) -> list[str]:
    return list(dict.fromkeys(row.policy for row in report.rows if row.policy != UNTRIMMED_POLICY))


def _draw_accuracy(axes: Axes, report: Report, kind: str) -> None:
    [untrimmed] = _rows(report, UNTRIMMED_POLICY, kind)
    axes.axhline(untrimmed.accuracy.value, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for policy, color in zip(_policies(report), _COLORS, strict=False):
        rows = _rows(report, policy, kind)
        kept = [row.kept_fraction for row in rows]
        low, high = ([untrimmed.accuracy.value + getattr(row.accuracy_change, end) for row in rows] for end in _ENDS)
        axes.fill_between(kept, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(kept, [row.accuracy.value for row in rows], color=color, marker="o", markersize=3, label=policy)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes)


def _draw_divergence(axes: Axes, report: Report) -> None:
    for policy, color in zip(_policies(report), _COLORS, strict=False):
        rows = [row for row in _rows(report, policy, ALL_KINDS) if row.divergence.value > 0]
        kept = [row.kept_fraction for row in rows]
        low, high = ([max(_LEAST_DIVERGENCE, getattr(row.divergence, end)) for row in rows] for end in _ENDS)
        axes.fill_between(kept, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(kept, [row.divergence.value for row in rows], color=color, marker="o", markersize=3)
        for row in rows if policy == _policies(report)[0] else ():
            at = (row.kept_fraction, row.divergence.value)
            axes.annotate(f"{row.k_ratio:g}", at, (-4, -12), textcoords="offset points", fontsize=8, color=color)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
