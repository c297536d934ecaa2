"""What a benchmark is asked and what it writes down: command line, JSON, tables for docs/."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.machine import about

__all__ = [
    "RESULTS",
    "Columns",
    "command_line",
    "finish",
    "markdown",
    "noted",
    "origin",
    "points",
    "precision",
    "tabulated",
    "write_json",
]

RESULTS: Final = Path(__file__).parent / "results"

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
    "runs": "timed calls of each",
}


def command_line(doc: str | None, out: str, **defaults: Any) -> argparse.Namespace:
    """The arguments of a benchmark: `--out`, `--threads` and what it names; torch takes so many threads as they say.

    Args:
        doc: of the benchmark.
        out: default of `--out`, in `RESULTS`.
        defaults: of its other options: False is a switch; a list several values, of its own where these are texts;
            None a text or nothing.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    for name, default in {"out": RESULTS / out, "threads": 1, **defaults}.items():
        how: dict[str, Any] = {"default": default}
        if default is False:
            how["action"] = "store_true"
        elif isinstance(default, list):
            how |= {"nargs": "+", "type": type(default[0]), "choices": default if isinstance(default[0], str) else None}
        elif default is not None:
            how["type"] = type(default)
        told = _HELP.get(name, name.replace("_", " "))
        parser.add_argument(f"--{name.replace('_', '-')}", **how, help=f"{told} (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(_most_threads(arguments))
    return arguments


def _most_threads(arguments: argparse.Namespace) -> int:
    return max(arguments.threads) if isinstance(arguments.threads, list) else int(arguments.threads)


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
    report = {
        "benchmark": Path(sys.argv[0]).stem.removeprefix("bench_"),
        **about(_most_threads(arguments)),
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


def points(value: float, low: float, high: float) -> str:
    """A change of a share in points, with its 95 % interval."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
