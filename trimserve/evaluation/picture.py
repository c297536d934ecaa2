"""Draws a report: accuracy and divergence against the kept fraction, and accuracy for each kind of question.

Needs matplotlib, which the extra `eval` brings; import it only where a picture is wanted.
"""

import math
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, Final, TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row

__all__ = ["INK", "draw_curves", "finish", "put_title"]

_COLORS: Final = ("#0a6fb8", "#e07b28", "#6f9a3c", "#8a5fb0")
_LINES: Final = ("-", (0, (2, 1.5)), (0, (1, 1)))  # of each merge_ratio
INK: Final = "#2b2f36"
"""Of text."""
_COLUMNS: Final = 5
_ENDS: Final = ("low", "high")
_LEAST_DIVERGENCE: Final = 1e-5  # where the logarithmic axis ends


class _Style(TypedDict):
    color: str
    linestyle: Any


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
        panel.set_title(f"{kind} ({_untrimmed(report, kind).num_questions})", loc="left", fontsize=10)
    put_title(figure, report, "bands: 95 % intervals of the change")
    figure.supxlabel("kept fraction of the visual features", color=INK, fontsize=11)
    figure.savefig(path)


def put_title(figure: Figure, report: Report, legend: str) -> None:
    """Say above a picture which model answered what, and what is drawn."""
    model, data = report.model, report.data
    asked = f"{data['num_questions']:,} questions about {data['num_images']:,} images"
    figure.suptitle(f"{model['model']} ({model['revision'][:12]}): {asked}; {legend}", color=INK, fontsize=11)


def finish(axes: Axes) -> None:
    """Shares of features on the horizontal axis, from 0; a grid instead of a frame."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _curves(report: Report, kind: str) -> Iterator[tuple[list[Row], str, _Style]]:
    """The rows of each policy and merge_ratio by kept fraction, what to call them, and how to draw them."""
    rows = [row for row in report.rows if row.kind == kind and row.policy != UNTRIMMED_POLICY]
    colors = dict(zip(dict.fromkeys(row.policy for row in rows), cycle(_COLORS), strict=False))
    lines = dict(zip(sorted({row.merge_ratio for row in rows}), cycle(_LINES), strict=False))
    for policy, merge_ratio in dict.fromkeys((row.policy, row.merge_ratio) for row in rows):
        curve = [row for row in rows if (row.policy, row.merge_ratio) == (policy, merge_ratio)]
        name = f"{policy}, merge_ratio {merge_ratio:g}" if len(lines) > 1 else policy
        style: _Style = {"color": colors[policy], "linestyle": lines[merge_ratio]}
        yield sorted(curve, key=lambda row: row.kept_fraction), name, style


def _untrimmed(report: Report, kind: str) -> Row:
    return next(row for row in report.rows if (row.policy, row.kind) == (UNTRIMMED_POLICY, kind))


def _draw_accuracy(axes: Axes, report: Report, kind: str) -> None:
    untrimmed = _untrimmed(report, kind)
    axes.axhline(untrimmed.accuracy.value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for rows, name, style in _curves(report, kind):
        kept = [row.kept_fraction for row in rows]
        low, high = ([untrimmed.accuracy.value + getattr(row.accuracy_change, end) for row in rows] for end in _ENDS)
        axes.fill_between(kept, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(kept, [row.accuracy.value for row in rows], **style, marker="o", markersize=3, label=name)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(right=1.02)
    finish(axes)


def _draw_divergence(axes: Axes, report: Report) -> None:
    for every, _, style in _curves(report, ALL_KINDS):
        rows = [row for row in every if row.divergence.value > 0]
        kept = [row.kept_fraction for row in rows]
        low, high = ([max(_LEAST_DIVERGENCE, getattr(row.divergence, end)) for row in rows] for end in _ENDS)
        axes.fill_between(kept, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(kept, [row.divergence.value for row in rows], **style, marker="o", markersize=3)
        for row in rows if style["color"] == _COLORS[0] else ():
            at = (row.kept_fraction, row.divergence.value)
            axes.annotate(f"{row.k_ratio:g}", at, (-4, -12), textcoords="offset points", fontsize=8, color=_COLORS[0])
    axes.set_yscale("log")
    axes.set_ylim(bottom=_LEAST_DIVERGENCE)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(right=1.02)
    finish(axes)
