"""What a benchmark is asked and what it writes down: command line, JSON, tables for docs/, bars of a picture."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.machine import about

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "INK",
    "RESULTS",
    "Columns",
    "bare",
    "command_line",
    "finish",
    "label_bars",
    "markdown",
    "noted",
    "origin",
    "points",
    "precision",
    "size",
    "tabulated",
    "times",
    "write_json",
]

RESULTS: Final = Path(__file__).parent / "results"
INK: Final = "#2b2f36"
"""Colour of a picture's words."""

Columns = Mapping[str, str | Callable[[Any], object]]
"""Head -> how a row is told: a format of its items, such as `{seconds:.1f}`, or a function of it."""

_BEGAN: Final = time.monotonic()
_HELP: Final = {
    "out": "where the report goes",
    "threads": "of one op",
    "bench_model": "folder; written if it is not there",
    "model": "folder of a checkpoint",
    "quick": "little of everything, to see whether it works",
    "questions": "how many",
    "pairs": "measured of both sides in turn, at least 2",
    "runs": "timed calls of each, at least 2",
}


def command_line(doc: str | None, out: str, **defaults: Any) -> argparse.Namespace:
    """The arguments of a benchmark, which are `--out` and what it names; torch takes so many threads as they say.

    Args:
        doc: of the benchmark.
        out: default of `--out`, in `RESULTS`.
        defaults: of its other options: False is a switch; a list several values, of its own where these are texts, any
            texts if it is empty; a tuple a choice whose first is the default; None a text or nothing.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The last line of standard output is the report.",
    )
    for name, default in {"out": RESULTS / out, **defaults}.items():
        how: dict[str, Any] = {"default": default, "type": type(default)}
        if default is None:
            how = {}
        elif default is False:
            how = {"action": "store_true"}
        elif isinstance(default, list):
            how = {"default": default, "type": type(default[0]) if default else str, "nargs": "+"}
            if default and isinstance(default[0], str):
                how["choices"] = default
        elif isinstance(default, tuple):
            how = {"default": default[0], "choices": default}
        elif isinstance(default, Path):
            how["type"] = Path
        told = _HELP.get(name, name.replace("_", " ")) + (" (%(default)s)" if "default" in how else "")
        parser.add_argument(f"--{name.replace('_', '-')}", **how, help=told)
    arguments = parser.parse_args()
    threads = vars(arguments).setdefault("threads", 1)
    torch.set_num_threads(max(threads) if isinstance(threads, list) else threads)
    return arguments


def noted(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a row to a report's, and tell it at once."""
    rows.append(row)
    print(json.dumps(row), file=sys.stderr, flush=True)


def finish(arguments: argparse.Namespace, figures: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Write the report and print it, as the last line of standard output.

    Args:
        arguments: of `command_line`.
        figures: what was found.
        name: of the file, where `--out` is a folder.
    Returns:
        The report.
    """
    threads = arguments.threads
    report = {
        "benchmark": Path(sys.argv[0]).stem.removeprefix("bench_"),
        **about(max(threads) if isinstance(threads, list) else threads),
        "seconds": round(time.monotonic() - _BEGAN, 1),
        **figures,
    }
    write_json(report, arguments.out / name)
    print(json.dumps(report))
    return report


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def tabulated(rows: Iterable[Any], columns: Columns, words: int = 1) -> str:
    """A table with a line for each row.

    Args:
        rows: of a report.
        columns: from the left.
        words: columns on the left that hold words; the others hold numbers, on the right.
    """
    cells = [
        [cell.format_map(row) if isinstance(cell, str) else cell(row) for cell in columns.values()] for row in rows
    ]
    return markdown([*columns], cells, words)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table of cells; see `tabulated`."""
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


def points(value: float, low: float, high: float) -> str:
    """A change of a share in points, with its 95 % interval."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


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
