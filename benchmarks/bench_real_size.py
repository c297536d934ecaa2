"""Serves a model as large as Llama-3.2-Vision 11B with quantized weights on this machine, and sets it beside its bytes.

    python -m benchmarks.bench_real_size [--quantize int8 int4] [--threads 2] [--out FILE]

Writes the checkpoint first if it is not there (20 GiB). One server after another loads it with int8 and int4 weights,
1 GiB of KV and bfloat16 elsewhere: seconds until it is loaded and warmed up, peak of resident memory, first token of a
question about a new image of one tile and about the same image again, and the time between the tokens of answers. The
floor of a decode step is the bytes of weights that it reads over the bandwidth of reading by as many threads. That is
measured before and after each answer, while the server rests: others may use the same memory.
"""

import argparse
import random
import time
import urllib.error
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any, Final

import torch

from benchmarks.floor import StepShape
from benchmarks.load import draw_picture
from benchmarks.machine import memory_bytes
from benchmarks.measure import bandwidth
from benchmarks.models import REAL_SIZE_MODEL, write_real_size_model
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated
from trimserve.client import Client
from trimserve.config import Quantize
from trimserve.process import ServerProcess, read_page, server_process
from trimserve.v1 import generation_pb2 as pb

__all__ = ["main", "table"]

_KV_BYTES: Final = "1GiB"
_BANDWIDTH_RUNS: Final = 9
_NUM_ANSWERS: Final = 5
_POLL_SECONDS: Final = 0.5


def _measure(quantize: Quantize, arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve the checkpoint in one precision."""
    shape = StepShape.of_checkpoint(arguments.model, torch.bfloat16, quantize)
    flags = ["--model", str(arguments.model), "--dtype", "bfloat16", "--quantize", quantize]
    flags += ["--kv-cache-bytes", _KV_BYTES, "--device", "cpu", "--num-threads", str(arguments.threads)]
    begin = time.monotonic()
    with server_process(*flags) as server:
        _wait_until_ready(server)
        ready = time.monotonic() - begin
        firsts, steps, rates = _ask(server, arguments.tokens)
        peak = memory_bytes(server.pid)
    floors = [2 * shape.weight_bytes / (before + after) for before, after in pairwise(rates)]
    return {
        "quantize": quantize,
        "ready_seconds": round(ready, 1),
        "peak_bytes": peak,
        "first_token_seconds_of_new_image": firsts[0],
        "first_token_seconds_of_same_image": firsts[1],
        "step_ms": [round(step * 1e3, 1) for step in steps],
        "step_weight_bytes": shape.weight_bytes,
        "read_bytes_per_second": [round(rate) for rate in rates],
        "step_floor_ms": [round(floor * 1e3, 1) for floor in floors],
        "step_over_floor": round(median(step / floor for step, floor in zip(steps, floors, strict=True)), 2),
    }


def _ask(server: ServerProcess, num_tokens: int) -> tuple[list[float], list[float], list[float]]:
    """Ask about an image again and again: seconds to each first token, between tokens, and bytes per second of reading.

    There is one rate more than there are answers.
    """
    firsts, steps, rates = [], [], [bandwidth("read", _BANDWIDTH_RUNS)]
    sampling = pb.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    with Client(server.address) as client:
        image = draw_picture(random.Random(0), client.model().tile_size)
        for _ in range(_NUM_ANSWERS):
            timings = client.generate("What do you see?", [image], sampling=sampling).timings
            firsts.append(round(timings.time_to_first_token_seconds, 2))
            steps.append((timings.total_seconds - timings.time_to_first_token_seconds) / (num_tokens - 1))
            rates.append(bandwidth("read", _BANDWIDTH_RUNS))
    return firsts, steps, rates


def _wait_until_ready(server: ServerProcess) -> None:
    """Until the weights are loaded and a first request of the server's own is answered."""
    while True:
        with suppress(urllib.error.HTTPError):
            read_page(f"http://{server.metrics_address}/readyz")
            return
        time.sleep(_POLL_SECONDS)  # readyz is asked, it calls nobody


def table(report: dict[str, Any]) -> str:
    """What serving a model of 11B parameters takes, as Markdown."""
    columns: Columns = {
        "weights": "{quantize}",
        "ready, s": "{ready_seconds:,.0f}",
        "peak memory": lambda row: f"{row['peak_bytes'] / 2**30:.1f} GiB",
        "first token, new image, s": "{first_token_seconds_of_new_image:,.1f}",
        "same image, s": "{first_token_seconds_of_same_image:,.1f}",
        "reads, GB/s": lambda row: f"{median(row['read_bytes_per_second']) / 1e9:.0f}",
        "step, ms (times its bytes)": lambda row: f"{median(row['step_ms']):,.0f} ({row['step_over_floor']:.2f})",
    }
    return f"{tabulated(report['rows'], columns)}\n\n{origin(report)}"


def main() -> None:
    """Measure and write."""
    options = {"model": REAL_SIZE_MODEL, "quantize": ["int8", "int4"], "tokens": 24, "threads": 2}
    arguments = command_line(__doc__, "real_size.json", **options)
    if not (arguments.model / "model.safetensors.index.json").exists():
        write_real_size_model(arguments.model)
    rows: list[dict[str, Any]] = []
    for quantize in arguments.quantize:
        noted(rows, _measure(quantize, arguments))
    finish(arguments, {"kv_cache": _KV_BYTES, "image": "one tile", "rows": rows})


if __name__ == "__main__":
    main()
