"""Servers of this checkout and of another one, asked by 16 clients in turns: tokens/s as ratios with an interval.

    python -m benchmarks.bench_checkouts_served ../before   # has a `.venv` of its own, made by `make build`

Both servers run all the time, so that each pair of figures is taken back to back; the one that is not asked is idle.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.bench_checkouts import ROOT, interval
from benchmarks.serve.load import closed_loop
from benchmarks.serve.models import MODELS, ModelName, UnderTest, under_test
from benchmarks.serve.report import about, write_json
from benchmarks.serve.service import GrpcTarget
from benchmarks.serve.workload import WorkloadSettings, make_workload
from trimserve.model.json_object import read_json

__all__ = ["main"]

NUM_CLIENTS: Final = 16


@contextmanager
def _server(root: Path, model: UnderTest, dtype: str) -> Iterator[str]:
    """A server that runs a checkout's code, until the block ends; its address."""
    command = [f"{root}/.venv/bin/python", "-m", "trimserve", "serve", "--port", "0", "--no-metrics"]
    command += ["--num-threads", "1", "--log-level", "warning", "--dtype", dtype, "--model", str(model.checkpoint)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"gRPC on ([^\s,]+)", process.stdout.readline())
            if found is None:
                raise SystemExit(f"{root} did not start")
            yield found[1]
        finally:
            process.terminate()


async def _tokens_per_second(address: str, model: UnderTest, max_new_tokens: int, seed: int) -> float:
    """One round of 16 requests, a mix of images and text that the servers have not seen."""
    tile_size = read_json(model.checkpoint / "config.json")["vision_config"]["image_size"]
    items = make_workload(WorkloadSettings(NUM_CLIENTS, tile_size, seed=seed))
    async with GrpcTarget(address, max_new_tokens=max_new_tokens, trim=model.trim(is_on=True)) as target:
        start = time.monotonic()
        exchanges = await closed_loop(target.ask, items, NUM_CLIENTS)
    if errors := [exchange.answer.error for exchange in exchanges if exchange.answer.error]:
        raise SystemExit(f"a request failed: {errors[0]}")
    return sum(exchange.answer.num_tokens for exchange in exchanges) / (time.monotonic() - start)


def _compare(addresses: Sequence[str], model: UnderTest, max_new_tokens: int, num_pairs: int) -> dict[str, Any]:
    pairs = []
    for number in range(num_pairs):
        order = (0, 1) if number % 2 else (1, 0)
        found = {
            which: asyncio.run(_tokens_per_second(addresses[which], model, max_new_tokens, number)) for which in order
        }
        pairs.append((found[0], found[1]))
        print(f"{number + 1} of {num_pairs}: {found[1] / found[0]:.3f}", flush=True)
    ratios = [ours / theirs for theirs, ours in pairs]
    return {
        "model": model.name,
        "clients": NUM_CLIENTS,
        "max_new_tokens": max_new_tokens,
        "other_tokens_per_second": round(statistics.median(theirs for theirs, _ in pairs), 2),
        "this_tokens_per_second": round(statistics.median(ours for _, ours in pairs), 2),
        "this_over_other": round(statistics.median(ratios), 4),
        "interval": interval(ratios),
        "pairs": num_pairs,
    }


def main() -> None:
    """Print the row; with --out, write it down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", choices=MODELS, default="bench")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name: ModelName = arguments.model
    model, other = under_test(name, (ROOT / "out/bench-model").resolve()), arguments.other.resolve()
    with _server(other, model, arguments.dtype) as theirs, _server(ROOT, model, arguments.dtype) as ours:
        row = {"dtype": arguments.dtype, **_compare((theirs, ours), model, arguments.max_new_tokens, arguments.pairs)}
    print(json.dumps(row))
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=other, capture_output=True, text=True, check=True
        )
        write_json({**about(1), "other_commit": commit.stdout.strip(), "rows": [row]}, arguments.out)


if __name__ == "__main__":
    main()
