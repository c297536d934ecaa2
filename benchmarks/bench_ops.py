"""Times each op against its composition in PyTorch, at the geometry of Llama-3.2-Vision 11B.

    python -m benchmarks.bench_ops [--runs 15] [--threads 1 2] [--device cuda] [--out DIR]

Compares results first, then times with cold caches: op, composition and the use of memory that bounds the op take
turns. Writes `ops.json`, of a GPU `ops_gpu.json`.
"""

from typing import Any, Final

import torch

from benchmarks.measure import stream, time_cold
from benchmarks.ops_cases import GEOMETRY, Case, make_cases
from benchmarks.report import command_line, finish, noted
from trimserve import ops

__all__ = ["main"]

_DTYPES: Final = (torch.float32, torch.bfloat16)


def main() -> None:
    """Compare, time, write."""
    arguments = command_line(__doc__, "", runs=15, threads=[1, 2], device="cpu")
    results: list[dict[str, Any]] = []
    is_gpu = arguments.device != "cpu"
    if is_gpu:  # where it is the default anyway, naming it would slow every call
        torch.set_default_device(arguments.device)
    for threads in [1] if is_gpu else arguments.threads:
        torch.set_num_threads(threads)
        for dtype in _DTYPES:
            for case in make_cases(dtype):
                noted(results, _measure(case, threads, arguments.runs))
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
    return row


if __name__ == "__main__":
    main()
