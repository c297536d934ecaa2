"""This checkout beside another one: decode steps and prefill of `bench`, in turns, as ratios with an interval.

    python -m benchmarks.bench_checkouts ../before   # has a `.venv` of its own, made by `make build`

A few percent are more than one run can tell on a shared machine. Both checkouts are loaded at once, and each pair of
figures is taken back to back; the interval is that of the median of the ratios, by bootstrap.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.bench_model import max_kept_fraction, write_bench_model
from benchmarks.generate.ours import Ours
from benchmarks.generate.setting import SETTINGS
from benchmarks.serve.report import about, write_json

__all__ = ["interval", "main"]

ROOT: Final = Path(__file__).parents[1]
PHASES: Final = (("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 1))
"""Phase and batch."""
SECONDS: Final = 0.7
"""Of calls for one figure; at least one is made."""


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median of some ratios, at least two."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return round(medians[50], 4), round(medians[1949], 4)


@torch.inference_mode()
def _measure(folder: Path, dtype: Any) -> None:
    """Answer `phase batch` lines of standard input with the median of some calls, in milliseconds."""
    torch.set_num_threads(1)
    ours = Ours(folder, dtype, "none", max_kept_fraction=max_kept_fraction(), most=32)
    asked = ours.ask(next(setting for setting in SETTINGS if setting.name == "default"))
    print("ready", flush=True)
    for line in sys.stdin:
        phase, batch = line.split()
        call = asked.step(int(batch)) if phase == "decode" else asked.prefill
        seconds: list[float] = []
        while sum(seconds) < SECONDS:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds) * 1e3, flush=True)


class _Checkout:
    """A process of a checkout that measures on demand; it runs this file, with that checkout's modules."""

    def __init__(self, root: Path, folder: Path, dtype: str) -> None:
        command = [f"{root}/.venv/bin/python", __file__, "--measure", str(folder), "--dtype", dtype]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env={"PYTHONPATH": str(root)}
        )
        self._read()

    def ask(self, phase: str, batch: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{phase} {batch}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit("a checkout ended before it answered")
        return line


def _compare(checkouts: Sequence[_Checkout], dtype: str, num_pairs: int) -> list[dict[str, Any]]:
    rows = []
    for phase, batch in PHASES:
        for checkout in checkouts:
            checkout.ask(phase, batch)
        pairs = []
        for number in range(num_pairs):
            order = (0, 1) if number % 2 else (1, 0)
            found = {which: checkouts[which].ask(phase, batch) for which in order}
            pairs.append((found[0], found[1]))
        ratios = [ours / theirs for theirs, ours in pairs]
        row = {
            "dtype": dtype,
            "phase": phase,
            "batch": batch,
            "other_ms": round(statistics.median(theirs for theirs, _ in pairs), 3),
            "this_ms": round(statistics.median(ours for _, ours in pairs), 3),
            "this_over_other": round(statistics.median(ratios), 4),
            "interval": interval(ratios),
            "pairs": num_pairs,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Print a row for each phase; with --out, write them down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--model", type=Path, default=ROOT / "out/bench-model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _measure(arguments.measure, arguments.dtype)
        return
    if arguments.other is None:
        parser.error("name the other checkout")
    if not (arguments.model / "config.json").exists():
        write_bench_model(arguments.model)
    other = arguments.other.resolve()
    checkouts = [_Checkout(root, arguments.model.resolve(), arguments.dtype) for root in (other, ROOT)]
    rows = _compare(checkouts, arguments.dtype, arguments.pairs)
    for checkout in checkouts:
        checkout.close()
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=other, capture_output=True, text=True, check=True
        )
        write_json({**about(1), "other_commit": commit.stdout.strip(), "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
