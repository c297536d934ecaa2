"""Draws a report of many policies that keep equally many features: the best ones strong, the others thin, all labelled.

Needs matplotlib, which the extra `eval` brings; import it only where a picture is wanted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trimserve.evaluation.dataset import ALL_KINDS
from trimserve.evaluation.picture import INK, finish, put_title
from trimserve.evaluation.report import UNTRIMMED_POLICY, Report, Row
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.table import POLICIES

__all__ = ["draw_comparison", "spread"]

_CONTROLS: Final = ("random", "strided")
_BAND: Final = "#c9cdd4"
_BEST: Final = ("#0a6fb8", "#d1495b", "#2e8b57")
"""Colours of the best policies, best first."""
_REST: Final = "#8b9099"
_NOT_KEPT: Final = {True: "the rest merged, merge_ratio {:g}", False: "the rest dropped"}
_LABEL_GAP: Final = 0.027
"""Least distance of two labels, as a share of the panel's height."""


def draw_comparison(report: Report, path: Path) -> None:
    """Write the picture: accuracy over all questions against the kept fraction, one panel for each merge_ratio.

    The three policies with the largest mean accuracy are strong, the others thin; each is labelled where its line ends.
    The dashed line is the untrimmed accuracy, bands are the controls' 95 % intervals of the change from it. Full lines
    look at the question, broken ones at the image alone.

    Args:
        report: what to draw.
        path: PNG to write.
    """
    rows = [row for row in report.rows if row.kind == ALL_KINDS]
    [untrimmed] = (row for row in rows if row.policy == UNTRIMMED_POLICY)
    by_merge_ratio = {ratio: report.compared(ratio) for ratio in sorted({row.merge_ratio for row in rows})}
    drawn = {ratio: compared for ratio, compared in by_merge_ratio.items() if compared}
    figure = Figure(figsize=(7.5 * len(drawn), 8), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (merge_ratio, compared) in zip(panels, drawn.items(), strict=True):
        _draw(panel, compared, untrimmed)
        panel.set_title(_NOT_KEPT[merge_ratio > 0].format(merge_ratio), loc="left", fontsize=11)
    put_title(figure, report, "exact match; dashed: untrimmed; bands: 95 % intervals of the controls' change")
    figure.supxlabel("kept fraction of the visual features, merged rows included", color=INK, fontsize=11)
    figure.savefig(path)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, in their order: neighbours at least `gap` apart, none above 1.

    >>> [round(height, 2) for height in spread([0.5, 0.5, 1.0, 1.0], 0.1)]
    [0.45, 0.55, 0.9, 1.0]
    """
    groups: list[list[float]] = []  # heights wanted; a group stands around their mean, gap after gap
    for height in sorted(heights):
        groups.append([height])
        while len(groups) > 1 and _low(groups[-1], gap) - _high(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1].extend(last)
    placed = [_low(group, gap) + gap * index for group in groups for index in range(len(group))]
    order = sorted(range(len(heights)), key=heights.__getitem__)
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def _low(group: list[float], gap: float) -> float:
    tall = gap * (len(group) - 1)
    return min(sum(group) / len(group) - tall / 2, 1 - tall)


def _high(group: list[float], gap: float) -> float:
    return _low(group, gap) + gap * (len(group) - 1)


def _draw(axes: Axes, rows: list[Row], untrimmed: Row) -> None:
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.kept_fraction):
        curves.setdefault(row.name, []).append(row)
    longest = max(map(len, curves.values()))
    ranked = sorted((name for name, curve in curves.items() if len(curve) == longest), key=lambda n: -_mean(curves[n]))
    best = dict(zip((name for name in ranked if name not in _CONTROLS), _BEST, strict=False))
    right = max(row.kept_fraction for row in rows)
    axes.plot((0, right), (untrimmed.accuracy.value,) * 2, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for name, curve in curves.items():
        kept = [row.kept_fraction for row in curve]
        line = "--" if issubclass(POLICIES[curve[0].policy], BeforeDecoder) else "-"
        if name in _CONTROLS:
            low, high = (
                [untrimmed.accuracy.value + getattr(row.accuracy_change, end) for row in curve]
                for end in ("low", "high")
            )
            axes.fill_between(kept, low, high, color=_BAND, alpha=0.7, linewidth=0)
        wide = 2.6 if name in best else 2.0 if name in _CONTROLS else 0.8
        color = best.get(name, INK if name in _CONTROLS else _REST)
        values = [row.accuracy.value for row in curve]
        axes.plot(kept, values, line, color=color, linewidth=wide, marker="o", markersize=1.3 * wide + 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    finish(axes)
    _label(axes, curves, best, right)


def _label(axes: Axes, curves: dict[str, list[Row]], best: dict[str, str], right: float) -> None:
    """Names beside the ends of their lines, moved apart."""
    low, high = axes.get_ylim()
    heights = spread([(curve[-1].accuracy.value - low) / (high - low) for curve in curves.values()], _LABEL_GAP)
    for (name, curve), height in zip(curves.items(), heights, strict=True):
        is_strong = name in best or name in _CONTROLS
        color = best.get(name, INK if is_strong else _REST)
        axes.annotate(
            name,
            (curve[-1].kept_fraction, curve[-1].accuracy.value),
            (right * 1.09, low + height * (high - low)),
            color=color,
            fontsize=9,
            fontweight="bold" if is_strong else "normal",
            verticalalignment="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )
    axes.set_ylim(low, high)
    axes.set_xlim(0, right * 1.6)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= right + 0.05])


def _mean(curve: list[Row]) -> float:
    return sum(row.accuracy.value for row in curve) / len(curve)
