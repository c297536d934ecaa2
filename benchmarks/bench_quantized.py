"""Times decode steps and prefills of `bench` with int8 and int4 weights beside each other and beside their bytes.

    python -m benchmarks.bench_quantized [--bench-model DIR] [--runs 40] [--threads 1] [--out FILE]

A step is that of one sequence which holds a question about an image of one tile; a prefill is that of so many text
tokens. Steps, prefills and a read of a large tensor take turns, so that what else the machine does slows all of them.
Floors: the bytes of weights over the bandwidth of reading; and the products over the rate of products whose weights lie
in the cache, by torch or by `ops.linear`, whichever is faster.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.floor import Floor, StepShape
from benchmarks.measure import stream, time_cold
from benchmarks.models import BENCH_MODEL, bench_model
from benchmarks.ours import SETTINGS, Ours
from benchmarks.report import Columns, command_line, finish, noted, origin, precision, tabulated
from trimserve.api.prompt import TokenPrompt
from trimserve.config import Dtype, Quantize
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan

__all__ = ["main", "measure", "table"]

_DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
_QUANTIZE: Final[tuple[Quantize, ...]] = ("int8", "int4")
_PREFILLS: Final = (16, 32, 64)

Row = dict[str, Any]


def measure(folder: Path, dtype: Dtype, runs: int) -> list[Row]:
    """Every precision, step and prefills, in turns; a dtype is that of everything that is not quantized."""
    models = {quantize: Ours.load(folder, 1, dtype=dtype, quantize=quantize) for quantize in _QUANTIZE}
    read, read_bytes = stream("read")
    calls: dict[tuple[Quantize, int], Callable[[], Any]] = {}
    for quantize, ours in models.items():
        calls[quantize, 1] = ours.ask(SETTINGS["one_tile"], max_kept_fraction=0.5).step(1)
        calls |= {(quantize, num_rows): _prefill(ours, num_rows) for num_rows in _PREFILLS}
    of_read, *times = time_cold([read, *calls.values()], runs)
    rows: list[Row] = []
    for (quantize, num_rows), milliseconds in zip(calls, times, strict=True):
        shape = StepShape.of_checkpoint(folder, getattr(torch, dtype), quantize)
        floor = Floor.of_step(shape, num_rows, 0, read_bytes / of_read["p10"] * 1e3)
        noted(
            rows,
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
            },
        )
    return rows


def _prefill(ours: Ours, num_rows: int) -> Callable[[], None]:
    """A prefill of so many text tokens, into pages that are then given back."""
    prompt = ours.model.prepare(TokenPrompt(tuple(range(num_rows)), ()))

    def run() -> None:
        kv = ours.pool.key_values(num_rows, 0)
        run_through(ours.model.prefill(prompt, [], TrimPlan.of(UNTRIMMED), kv))
        kv.release()

    return run


def table(report: dict[str, Any]) -> str:
    """Steps and prefills with quantized weights beside their floors, as Markdown."""
    columns: Columns = {
        "weights": precision,
        "rows": "{rows}",
        "ms": "{milliseconds[median]:.1f}",
        "reading the weights, ms": "{bytes_floor_ms:.1f}",
        "products, ms": "{products_floor_ms:.1f}",
        "times the larger": "{over_floor:.2f}",
    }
    rows = report["rows"]
    steps = {(row["dtype"], row["quantize"]): row["milliseconds"]["median"] for row in rows if row["phase"] == "step"}
    dtypes = dict.fromkeys(dtype for dtype, _ in steps)
    told = " and ".join(f"{steps[dtype, 'int8'] / steps[dtype, 'int4']:.2f} with {dtype} rows" for dtype in dtypes)
    told_ratios = (
        f"A step with int8 over one with int4: {told}. The last column compares fastest tenths; it falls "
        "below 1 where many outputs share the packing of rows, which the products' rate counts for few."
    )
    return "\n\n".join([tabulated(rows, columns), told_ratios, origin(report)])


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "quantized.json", bench_model=BENCH_MODEL, runs=40)
    folder = bench_model(arguments.bench_model)
    rows = [row for dtype in _DTYPES for row in measure(folder, dtype, arguments.runs)]
    finish(arguments, {"model": "bench", "rows": rows})


if __name__ == "__main__":
    main()
