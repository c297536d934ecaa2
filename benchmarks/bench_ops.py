"""Times each op against its composition in PyTorch, at the geometry of Llama-3.2-Vision 11B.

    python -m benchmarks.bench_ops [--runs 15] [--threads 1 2] [--ops NAME ...] [--device cuda] [--out DIR]

Compares results first, then times with cold caches: op, composition and the use of memory that bounds the op take
turns. Writes `ops.json`, of a GPU `ops_gpu.json`; with `--ops` nothing.
"""

from typing import Any, Final

import torch

from benchmarks.measure import peak_extra_bytes, stream, time_cold
from benchmarks.ops_cases import GEOMETRY, Case, make_cases
from benchmarks.report import command_line, finish
from trimserve import ops

__all__ = ["main"]

_DTYPES: Final = (torch.float32, torch.bfloat16)


def main() -> None:
    """Compare, time, write."""
    arguments = command_line(__doc__, "", runs=15, threads=[1, 2], ops=[], device=("cpu", "cuda"))
    results: list[dict[str, Any]] = []
    print(f"{'op':46} {'dtype':9} {'threads':>7} {'ms: median':>10} {'p10':>9} {'p90':>9} {'PyTorch':>9} {'floor':>6}")
    is_gpu = arguments.device == "cuda"
    if is_gpu:  # where it is the default anyway, naming it would slow every call
        torch.set_default_device("cuda")
    for threads in [1] if is_gpu else arguments.threads:
        torch.set_num_threads(threads)
        for dtype in _DTYPES:
            for case in make_cases(dtype):
                if not arguments.ops or case.op in arguments.ops:
                    results.append(_measure(case, threads, arguments.runs))
                    print(_line(results[-1]), flush=True)
    if not arguments.ops:
        figures = {"geometry": GEOMETRY, "build": ops.build_info(), "results": results}
        finish(arguments, figures, "ops_gpu.json" if is_gpu else "ops.json")


def _measure(case: Case, threads: int, runs: int) -> dict[str, Any]:
    calls, moved_bytes = [case.run, case.baseline], 0
    if case.floor:
        move, moved_bytes = stream(case.floor)
        calls.append(move)
    ours, theirs, *moves = time_cold(calls, runs)
    row: dict[str, Any] = {
        "op": case.op,
        "detail": case.detail,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": threads,
        "ms": ours,
        "baseline": case.baseline_name,
        "baseline_ms": theirs,
        "speedup": round(theirs["median"] / ours["median"], 2),
        "bytes": case.num_bytes,
    }
    for milliseconds in moves:
        possible = moved_bytes / milliseconds["median"] * 1e3
        reached = case.num_bytes / ours["median"] * 1e3
        row |= {"floor": case.floor, "floor_bytes_per_second": round(possible)}
        row |= {"bandwidth_ratio": round(reached / possible, 3)}
    if case.matrix_bytes:
        row |= {"peak_extra_bytes": peak_extra_bytes(case.run), "matrix_bytes": case.matrix_bytes}
    return row


def _line(row: dict[str, Any]) -> str:
    ours = row["ms"]
    share = f"{row['bandwidth_ratio']:6.0%}" if "bandwidth_ratio" in row else ""
    return (
        f"{row['op'] + ' ' + row['detail']:46} {row['dtype']:9} {row['threads']:7} {ours['median']:10.3f} "
        f"{ours['p10']:9.3f} {ours['p90']:9.3f} {row['baseline_ms']['median']:9.3f} {share}"
    )


if __name__ == "__main__":
    main()
