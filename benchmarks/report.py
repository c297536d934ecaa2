"""What a benchmark writes down: its command line, JSON, tables for docs/, and bars of a picture."""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.machine import about
from benchmarks.models import BENCH_MODEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "INK",
    "RESULTS",
    "bare",
    "finish",
    "label_bars",
    "markdown",
    "options",
    "origin",
    "precision",
    "size",
    "times",
    "write_json",
]

RESULTS: Final = Path(__file__).parent / "results"
INK: Final = "#2b2f36"
"""Colour of a picture's words."""

_BEGAN: Final = time.monotonic()


def options(
    doc: str | None, out: str, *, threads: bool = False, bench_model: bool = False, quick: bool = False
) -> argparse.ArgumentParser:
    """The command line of a benchmark: `--out`, and what many of them take.

    Args:
        doc: of the benchmark.
        out: default of `--out`, in `RESULTS`.
        threads: whether it takes `--threads`.
        bench_model: whether it takes `--bench-model`.
        quick: whether it takes `--quick`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / out, help="where the report goes")
    if threads:
        parser.add_argument("--threads", type=int, default=1, help="of one op")
    if bench_model:
        parser.add_argument("--bench-model", type=Path, default=BENCH_MODEL, help="folder; written if it is not there")
    if quick:
        parser.add_argument("--quick", action="store_true", help="little of everything, to see whether it works")
    return parser


def finish(benchmark: str, out: Path, figures: dict[str, Any], num_threads: int = 1) -> dict[str, Any]:
    """Write the report and print it, as the last line of standard output.

    Args:
        benchmark: its name.
        out: JSON file.
        figures: what was found.
        num_threads: of one op, in every process that was measured.
    Returns:
        The report.
    """
    seconds = round(time.monotonic() - _BEGAN, 1)
    report = {"benchmark": benchmark, **about(num_threads), "seconds": seconds, **figures}
    write_json(report, out)
    print(json.dumps(report))
    return report


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table.

    Args:
        head: of the columns.
        rows: their cells.
        words: columns on the left that hold words; the others hold numbers, on the right.
    """
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def origin(report: dict[str, Any]) -> str:
    """Where and with what a report was measured, in a sentence."""
    machine, versions, commit = report["machine"], report["versions"], report["commit"]
    at = "" if commit is None else f" at {commit[:12]}"
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['num_threads']} thread(s) per process"
    return (
        f"Measured on {device}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"trimserve {versions['trimserve']}{at}."
    )


def precision(row: dict[str, Any]) -> str:
    """How a row's weights are stored."""
    dtype, quantize = row["dtype"], row["quantize"]
    return str(dtype) if quantize == "none" else f"{quantize}, {dtype}"


def times(row: dict[str, Any]) -> str:
    """A row's `speedup` with its interval."""
    low, high = row["interval"]
    return f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]"


def size(num_bytes: int) -> str:
    """Bytes, as people read them."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= one:
            return f"{num_bytes / one:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def bare(axes: "Axes", title: str, sides: Iterable[str] = ("top", "right", "bottom")) -> None:
    """A title on the left, and no lines where none are needed."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=9, colors=INK)
    for side in sides:
        axes.spines[side].set_visible(False)


def label_bars(axes: "Axes", bars: dict[str, float], colours: Sequence[str], form: str) -> None:
    """Horizontal bars with their values, the first on top."""
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, [form.format(value) for value in bars.values()], padding=3, fontsize=9, color=INK)
    axes.set_xlim(right=1.25 * max(bars.values(), default=1))
    axes.invert_yaxis()
    axes.set_xticks([])
