"""Draws a report of many policies that keep equally many features: one line for each, the controls as grey bands.

Needs matplotlib, which the extra `eval` brings; import it only where a picture is wanted.
"""

from itertools import cycle
from pathlib import Path
from typing import Final

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.picture import INK, finish, put_title
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.table import POLICIES

__all__ = ["draw_comparison"]

_CONTROLS: Final = {"random": "#8b9099", "strided": "#c3c7ce"}
_COLORS: Final = [colormaps["tab10"](index) for index in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # 7 is grey
_MARKERS: Final = ("o", "s", "^", "v", "D", "P", "X", "*", "h")
_NOT_KEPT: Final = {True: "the rest merged, merge_ratio {:g}", False: "the rest dropped"}


def draw_comparison(report: Report, path: Path) -> None:
    """Write the picture: accuracy over all questions against the kept fraction, one panel for each merge_ratio.

    The dashed line is the untrimmed accuracy, the bands are the controls' 95 % intervals of the change from it. Full
    lines look at the question, broken ones at the image alone.

    Args:
        report: what to draw.
        path: PNG to write.
    """
    rows = [row for row in report.rows if row.kind == ALL_KINDS]
    [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
    merge_ratios = sorted({row.merge_ratio for row in rows})
    figure = Figure(figsize=(3.5 + 6 * len(merge_ratios), 7), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(merge_ratios), sharey=True, squeeze=False)[0]
    for panel, merge_ratio in zip(panels, merge_ratios, strict=True):
        _draw(panel, report.compared(merge_ratio), untrimmed)
        panel.set_title(_NOT_KEPT[merge_ratio > 0].format(merge_ratio), loc="left", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=10)
    put_title(figure, report, "exact match; dashed: untrimmed; bands: 95 % intervals of the controls' change")
    figure.supxlabel("kept fraction of the visual features, merged rows included", color=INK, fontsize=11)
    figure.savefig(path)


def _draw(axes: Axes, rows: list[Row], untrimmed: Row) -> None:
    axes.axhline(untrimmed.accuracy.value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    names = {row.name: row.policy for row in rows}
    looks = zip(cycle(_COLORS), cycle(_MARKERS), strict=False)
    for name, policy in sorted(names.items(), key=lambda each: each[1] not in _CONTROLS):
        curve = sorted((row for row in rows if row.name == name), key=lambda row: row.kept_fraction)
        kept, values = [row.kept_fraction for row in curve], [row.accuracy.value for row in curve]
        if policy in _CONTROLS:
            low, high = (
                [untrimmed.accuracy.value + getattr(row.accuracy_change, end) for row in curve]
                for end in ("low", "high")
            )
            axes.fill_between(kept, low, high, color=_CONTROLS[policy], alpha=0.55, linewidth=0, label=policy)
            continue
        color, marker = next(looks)
        line, inside = ("--", "white") if issubclass(POLICIES[policy], BeforeDecoder) else ("-", color)
        [drawn] = axes.plot(kept, values, color=color, linestyle=line, linewidth=1.3, label=name)
        drawn.set(marker=marker, markersize=5, markerfacecolor=inside)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    finish(axes)
