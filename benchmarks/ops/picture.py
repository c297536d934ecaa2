"""Draws the report of the ops: how much faster than PyTorch, and how close to the bandwidth of memory."""

from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_report"]

_COLOURS: Final = ("#0a6fb8", "#7fb5dd")
_INK: Final = "#2b2f36"


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        report: the JSON document of `bench_ops`.
        path: PNG to write.
    """
    rows = report["results"]
    num_names = len({_name(row) for row in rows})
    figure = Figure(figsize=(16, 1.4 + 0.42 * num_names), dpi=150, layout="constrained")
    speed, share = figure.subplots(1, 2, width_ratios=(1, 1))
    _bars(speed, rows, "speedup", "{:.1f}x")
    speed.set_xscale("log")
    speed.set_xlim(0.5, 2 * max(row["speedup"] for row in rows))
    speed.xaxis.set_visible(False)
    speed.axvline(1, color=_INK, linewidth=0.8)
    speed.set_title("times as fast as the same in PyTorch, logarithmic", loc="left", fontsize=10)
    _bars(share, [row for row in rows if row.get("bandwidth_ratio")], "bandwidth_ratio", "{:.0%}")
    share.set_title("share of memory bandwidth, same run", loc="left", fontsize=10)
    figure.legend(*share.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside upper right", ncols=2)
    machine = report["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['simd']}"
    figure.suptitle(f"{device}, torch {machine['torch']}", color=_INK, fontsize=11)
    figure.savefig(path)


def _name(row: dict[str, Any]) -> str:
    return " ".join(filter(None, (row["op"], row["detail"], row["dtype"])))


def _bars(axes: Axes, rows: list[dict[str, Any]], value: str, form: str) -> None:
    names = list(dict.fromkeys(_name(row) for row in rows))
    threads = sorted({row["threads"] for row in rows})
    height = 0.8 / len(threads)
    for i, num_threads in enumerate(threads):
        of_threads = [row for row in rows if row["threads"] == num_threads]
        places = [names.index(_name(row)) + (i - (len(threads) - 1) / 2) * height for row in of_threads]
        label = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        drawn = axes.barh(places, [row[value] for row in of_threads], height, color=_COLOURS[i % 2], label=label)
        axes.bar_label(drawn, [form.format(row[value]) for row in of_threads], padding=3, fontsize=8, color=_INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(right=1.18 * max((row[value] for row in rows), default=1))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.tick_params(labelsize=9, colors=_INK)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
