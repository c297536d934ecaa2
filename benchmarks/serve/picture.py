"""Draws a report: throughput, waiting for the first token, pace of the stream, and the cost of the service."""

from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_report"]

_OURS: Final = "#0a6fb8"
_THEIRS: Final = "#a9b2bd"
_INK: Final = "#2b2f36"
_NAMES: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve,\nuntrimmed",
    "transformers_batched": "transformers,\nbatched",
    "transformers_sequential": "transformers,\none at a time",
    "transformers_serve": "transformers\nserve",
}


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Write the picture, a row for each model.

    Args:
        report: as `make_report` made it.
        path: PNG to write.
    """
    models = report["models"]
    figure = Figure(figsize=(15, 0.6 + 3.3 * len(models)), dpi=150, layout="constrained")
    grid = figure.subplots(len(models), 4, squeeze=False)
    for row, model in zip(grid, models, strict=True):
        plan = model["plan"]
        _bars(row[0], model, lambda load: load.get("tokens_per_second"), "{:,.0f}")
        row[0].set_title(f"{model['model']}: tokens per second, {plan['concurrency']} clients", loc="left", fontsize=10)
        _bars(row[1], model, lambda load: _point(load, "time_to_first_token_seconds", "p50"), "{:.2g} s")
        row[1].set_title("time to first token, median", loc="left", fontsize=10)
        _bars(row[2], model, lambda load: _milliseconds(load, "inter_token_seconds", "p99"), "{:,.1f} ms")
        row[2].set_title("between two tokens, p99", loc="left", fontsize=10)
        _draw_probes(row[3], model)
    machine = report["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['num_threads']} thread(s) for every model; same requests, "
        f"same dtype, one run; transformers {report['versions']['transformers']}",
        color=_INK,
        fontsize=11,
    )
    figure.savefig(path)


def _bars(axes: Axes, model: dict[str, Any], value_of: Any, form: str) -> None:
    values = {name: value_of(load) for name, load in model["loads"].items() if name in _NAMES}
    shown = {name: values[name] for name in _NAMES if values.get(name) is not None}
    colours = [_OURS if name.startswith("trimserve") else _THEIRS for name in shown]
    _draw_bars(axes, {_NAMES[name]: value for name, value in shown.items()}, colours, form)


def _draw_probes(axes: Axes, model: dict[str, Any]) -> None:
    images, latency = model["repeated_images"]["four_tiles"], model["added_latency"]
    bars = {
        "first token,\nnew image": images["first_seconds"] * 1e3,
        "the same image\nagain": images["repeated_seconds"] * 1e3,
        "a token\nthrough gRPC": latency["service_seconds_per_token"] * 1e3,
        "bare decode\nstep": latency["bare_step_seconds"] * 1e3,
    }
    _draw_bars(axes, bars, [_OURS, _OURS, _OURS, _THEIRS], "{:,.1f} ms")
    axes.set_xscale("log")
    axes.set_xlim(min(bars.values()) / 4, 4 * max(bars.values()))
    axes.set_title("one request at a time, 4 tiles (log scale)", loc="left", fontsize=10)


def _draw_bars(axes: Axes, bars: dict[str, float], colours: list[str], form: str) -> None:
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, [form.format(value) for value in bars.values()], padding=3, fontsize=9, color=_INK)
    axes.set_xlim(right=1.25 * max(bars.values(), default=1))
    axes.invert_yaxis()
    axes.tick_params(labelsize=9, colors=_INK)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _point(load: dict[str, Any], name: str, point: str) -> float | None:
    found = load.get(name)
    return found[point] if found else None


def _milliseconds(load: dict[str, Any], name: str, point: str) -> float | None:
    seconds = _point(load, name, point)
    return None if seconds is None else 1e3 * seconds
