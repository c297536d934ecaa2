"""Times decode steps and prefills of `bench` with int8 and int4 weights beside each other and beside their bytes.

    python -m benchmarks.bench_quantized [--model DIR] [--runs 40] [--threads 1] [--out FILE]

A step is that of one sequence which holds a question about an image of one tile; a prefill is that of so many text
tokens. Steps, prefills and a read of a large tensor take turns, so that what else the machine does slows all of them.
Floors: the bytes of weights over the bandwidth of reading; and the products over the rate of products whose weights lie
in the cache, by torch or by `ops.linear`, whichever is faster. The last line of standard output is the report.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.bench_model import BENCH_MODEL
from benchmarks.generate.floor import Floor, StepShape
from benchmarks.generate.ours import Ours
from benchmarks.generate.setting import SETTINGS
from benchmarks.ops.measure import stream, time_milliseconds
from benchmarks.serve.models import under_test
from benchmarks.serve.report import about, write_json
from trimserve.api.prompt import TokenPrompt
from trimserve.config import Dtype, Quantize
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan

__all__ = ["main", "measure"]

_OUT: Final = Path(__file__).parent / "results" / "quantized.json"
_DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
_QUANTIZE: Final[tuple[Quantize, ...]] = ("int8", "int4")
_PREFILLS: Final = (16, 32, 64)
_ONE_TILE: Final = SETTINGS[2]

Row = dict[str, Any]


def main() -> None:
    """Command line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    bench = under_test("bench", arguments.model)
    rows = [row for dtype in _DTYPES for row in measure(bench.checkpoint, dtype, arguments.runs)]
    report = {
        "benchmark": "quantized",
        **about(arguments.threads),
        "seconds": round(time.monotonic() - start, 1),
        "model": "bench",
        "rows": rows,
    }
    write_json(report, arguments.out)
    print(json.dumps(report))


def measure(folder: Path, dtype: Dtype, runs: int) -> list[Row]:
    """Every precision, step and prefills, in turns.

    Args:
        folder: of the checkpoint.
        dtype: of everything that is not quantized.
        runs: calls of each, at least 2.
    """
    models = {quantize: Ours(folder, dtype, quantize, max_kept_fraction=0.5, most=1) for quantize in _QUANTIZE}
    read, read_bytes = stream("read")
    calls: dict[tuple[Quantize, int], Callable[[], Any]] = {}
    for quantize, ours in models.items():
        calls[quantize, 1] = ours.ask(_ONE_TILE).step(1)
        calls |= {(quantize, num_rows): _prefill(ours, num_rows) for num_rows in _PREFILLS}
    of_read, *times = time_milliseconds([read, *calls.values()], runs)
    rows = []
    for (quantize, num_rows), milliseconds in zip(calls, times, strict=True):
        shape = StepShape.of_checkpoint(folder, getattr(torch, dtype), quantize)
        floor = Floor.of_step(shape, num_rows, 0, read_bytes / of_read["p10"] * 1e3)
        rows.append(
            {
                "dtype": dtype,
                "quantize": quantize,
                "phase": "step" if num_rows == 1 else "prefill",
                "rows": num_rows,
                "milliseconds": milliseconds,
                "weight_bytes": shape.weight_bytes,
                "bytes_floor_ms": round(floor.bytes_ms, 3),
                "products_floor_ms": round(floor.products_ms, 3),
                "over_floor": round(milliseconds["p10"] / floor.ms, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    steps: dict[Any, Any] = {row["quantize"]: row["milliseconds"] for row in rows if row["phase"] == "step"}
    ratios = {name: round(steps["int8"][name] / steps["int4"][name], 2) for name in ("median", "p10")}
    rows.append({"dtype": dtype, "phase": "step", "int8_over_int4": ratios})
    return rows


def _prefill(ours: Ours, num_rows: int) -> Callable[[], None]:
    """A prefill of so many text tokens, into pages that are then given back."""
    prompt = ours.model.prepare(TokenPrompt(tuple(range(num_rows)), ()))

    def run() -> None:
        kv = ours.pool.key_values(num_rows, 0)
        run_through(ours.model.prefill(prompt, [], TrimPlan.of(UNTRIMMED), kv))
        kv.release()

    return run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BENCH_MODEL, help="folder of bench; written if it is not there")
    parser.add_argument("--runs", type=int, default=40, help="calls of each")
    parser.add_argument("--threads", type=int, default=1, help="threads of one op")
    parser.add_argument("--out", type=Path, default=_OUT, help="the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
