"""Serves a model as large as Llama-3.2-Vision 11B with quantized weights on this machine, and sets it beside its bytes.

    python -m benchmarks.bench_real_size [--quantize int8 int4] [--threads 2] [--out FILE]

Writes the checkpoint first if it is not there (`real_size_model.py`, 20 GiB). One server after another loads it with
int8 and int4 weights, 1 GiB of KV and bfloat16 elsewhere: seconds until it is loaded and warmed up, peak of resident
memory, first token of a question about a new image of one tile and about the same image again, and the time
between tokens of one answer. The floor of a decode step is the bytes of weights that it reads over the bandwidth of
reading, measured by the same number of threads before and after. The last line of standard output is the report.
"""

import argparse
import json
import random
import re
import statistics
import time
import urllib.error
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.generate.floor import StepShape
from benchmarks.ops.measure import bandwidth
from benchmarks.real_size_model import REAL_SIZE_MODEL, write_real_size_model
from benchmarks.serve.report import about, write_json
from benchmarks.serve.workload import draw_picture
from trimserve.client import Client
from trimserve.config import Quantize
from trimserve.process import ServerProcess, read_page, server_process
from trimserve.v1 import generation_pb2 as pb

__all__ = ["main", "measure"]

_OUT: Final = Path(__file__).parent / "results" / "real_size.json"
_KV_BYTES: Final = "1GiB"
_QUESTION: Final = "What do you see?"
_BANDWIDTH_RUNS: Final = 9
_POLL_SECONDS: Final = 0.5


def main() -> None:
    """Command line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    if not (arguments.model / "model.safetensors.index.json").exists():
        write_real_size_model(arguments.model)
    rows = [measure(arguments.model, quantize, arguments) for quantize in arguments.quantize]
    report = {
        "benchmark": "real_size",
        **about(arguments.threads),
        "seconds": round(time.monotonic() - start, 1),
        "kv_cache": _KV_BYTES,
        "image": "one tile",
        "rows": rows,
    }
    write_json(report, arguments.out)
    print(json.dumps(report))


def measure(folder: Path, quantize: Quantize, arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve the checkpoint in one precision.

    Args:
        folder: of the checkpoint.
        quantize: as in `ModelConfig`.
        arguments: of the command line.
    """
    shape = StepShape.of_checkpoint(folder, torch.bfloat16, quantize)
    rates = [bandwidth("read", _BANDWIDTH_RUNS)]
    options = ["--model", str(folder), "--dtype", "bfloat16", "--quantize", quantize, "--kv-cache-bytes", _KV_BYTES]
    options += ["--device", "cpu", "--num-threads", str(arguments.threads)]
    begin = time.monotonic()
    with server_process(*options) as server:
        _wait_until_ready(server)
        ready = time.monotonic() - begin
        answers = _ask(server, arguments.tokens)
        peak = _peak_bytes(server.pid)
    rates.append(bandwidth("read", _BANDWIDTH_RUNS))
    floor = shape.weight_bytes / statistics.mean(rates)
    step = statistics.mean(answers["steps"])
    row = {
        "quantize": quantize,
        "ready_seconds": round(ready, 1),
        "peak_bytes": peak,
        "first_token_seconds_of_new_image": answers["first"][0],
        "first_token_seconds_of_same_image": answers["first"][1],
        "step_ms": round(step * 1e3, 1),
        "step_weight_bytes": shape.weight_bytes,
        "read_bytes_per_second": [round(rate) for rate in rates],
        "step_floor_ms": round(floor * 1e3, 1),
        "step_over_floor": round(step / floor, 2),
    }
    print(json.dumps(row), flush=True)
    return row


def _ask(server: ServerProcess, num_tokens: int) -> dict[str, Any]:
    """Ask about an image twice: seconds to the first token of each, and between its tokens on average."""
    found: dict[str, Any] = {"first": [], "steps": []}
    with Client(server.address) as client:
        tile_size = client.model().tile_size
        image = draw_picture(random.Random(0), tile_size)
        for _ in range(2):
            sampling = pb.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
            timings = client.generate(_QUESTION, [image], sampling=sampling).timings
            found["first"].append(round(timings.time_to_first_token_seconds, 2))
            after_first = timings.total_seconds - timings.time_to_first_token_seconds
            found["steps"].append(after_first / (num_tokens - 1))
    return found


def _wait_until_ready(server: ServerProcess) -> None:
    """Until the weights are loaded and a first request of the server's own is answered."""
    while True:
        with suppress(urllib.error.HTTPError):
            read_page(f"http://{server.metrics_address}/readyz")
            return
        time.sleep(_POLL_SECONDS)


def _peak_bytes(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, "the process has ended"
    return int(found[1]) * 1024


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REAL_SIZE_MODEL, help="folder of the checkpoint")
    parser.add_argument("--quantize", nargs="+", default=["int8", "int4"], help="which precisions")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--threads", type=int, default=2, help="threads of one op")
    parser.add_argument("--out", type=Path, default=_OUT, help="the report")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
