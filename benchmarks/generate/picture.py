"""Draws the report of generation: tokens per second by batch, and steps beside their floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_report"]

_INK: Final = "#2b2f36"
_LINES: Final = (  # engine, dtype, quantize, colour, dash
    ("trimserve", "float32", "none", "#0a6fb8", "-"),
    ("trimserve", "bfloat16", "none", "#12875a", "-"),
    ("trimserve", "float32", "int8", "#c2410c", "-"),
    ("transformers", "float32", "none", "#0a6fb8", ":"),
    ("transformers", "bfloat16", "none", "#12875a", ":"),
)


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        report: the JSON document of `bench_generate`.
        path: PNG to write.
    """
    rows = [row for row in report["rows"] if row["phase"] == "decode" and "ms" in row]
    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    speed, floor = figure.subplots(1, 2)
    for engine, dtype, quantize, colour, dash in _LINES:
        setting = "default" if engine == "trimserve" else "off"
        wanted = {"engine": engine, "dtype": dtype, "quantize": quantize, "setting": setting}
        found = [row for row in rows if wanted.items() <= row.items()]
        name = " ".join(filter(None, (engine, dtype, "" if quantize == "none" else quantize)))
        _line(speed, found, [row["batch"] / row["ms"]["median"] * 1e3 for row in found], name, colour, dash)
        if engine == "trimserve":
            _line(floor, found, [row["times_floor"] for row in found], name, colour, dash)
    _finish(speed, "tokens per second, image of four tiles", rows)
    speed.set_yscale("log")
    _finish(floor, "step, times its floor", rows)
    floor.axhline(1, color=_INK, linewidth=0.8)
    floor.set_ylim(bottom=0.9)
    machine = report["machine"]
    threads = f"{machine['num_threads']} thread{'s' if machine['num_threads'] > 1 else ''}"
    figure.suptitle(f"{machine['cpu']}, {machine['simd']}, {threads}", color=_INK, fontsize=11)
    figure.savefig(path)


def _line(
    axes: Axes, rows: Sequence[dict[str, Any]], values: Sequence[float], name: str, colour: str, dash: str
) -> None:
    axes.plot([row["batch"] for row in rows], values, dash, color=colour, label=name, marker="o", markersize=4)


def _finish(axes: Axes, title: str, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("batch", fontsize=9, color=_INK)
    axes.set_xscale("log", base=2)
    batches = sorted({row["batch"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.tick_params(labelsize=9, colors=_INK)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
