"""Times what the metrics add to one decode step: every token of a batch counted, timed and sent, and the step itself.

    python benchmarks/bench_metrics.py [--batch 16] [--runs 2000] [--out FILE]

Also times a scrape. The last line is one JSON document. Fails when an undisturbed step takes longer than the budget.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import generate_latest

from benchmarks.serve.report import about, write_json
from trimserve.api.chunks import TokenDelta
from trimserve.api.prompt import RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import Metrics
from trimserve.server.observer import RequestObserver
from trimserve.trimming.policies.table import POLICIES

BUDGET_MICROSECONDS = 20.0
"""Of a step of 16 streams, by the tenth percentile: what disturbs a step is not the metrics."""

REQUEST = GenerationRequest("bench", RawPrompt("hi", ()), SamplingParams(), TrimRequest(k_ratio=0.2))
DELTA = TokenDelta("word", (5,))


def make_step(metrics: Metrics, batch: int) -> Callable[[], None]:
    """What the metrics do in one decode step of `batch` streams, wherever in the server that is."""
    stream = next(labels for labels in RPCS if labels[0] == "server_stream")
    observers = [RequestObserver(metrics, "GenerateStream") for _ in range(batch)]
    counts = [metrics.rpc_messages_sent.labels(*stream) for _ in range(batch)]
    for observer in observers:
        observer.accepted(REQUEST)
    streams = list(zip(observers, counts, strict=True))

    def step() -> None:
        for observer, sent in streams:
            time.monotonic()  # the engine's clock before and after detokenising
            time.monotonic()
            observer.saw(DELTA)
            sent.inc()
        metrics.saw_step(batch, 0.02)

    return step


def time_microseconds(call: Callable[[], object], runs: int) -> dict[str, float]:
    """Median, 10th and 90th percentile of `runs` calls."""
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(deciles[4], 2), "p10": round(deciles[0], 2), "p90": round(deciles[-1], 2)}


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="streams that decode together, at least 1")
    parser.add_argument("--runs", type=int, default=2000, help="timed steps, at least 2")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args()

    metrics = Metrics(POLICIES, RPCS)
    step = make_step(metrics, arguments.batch)
    time_microseconds(step, arguments.runs)  # warm
    document = {
        "benchmark": "metrics",
        **about(1),
        "batch": arguments.batch,
        "step_microseconds": time_microseconds(step, arguments.runs),
        "scrape_microseconds": time_microseconds(lambda: generate_latest(metrics.registry), 50),
        "series": sum(len(family.samples) for family in metrics.registry.collect()),
    }
    if arguments.out:
        write_json(document, arguments.out)
    print(json.dumps(document))
    took, allowed = document["step_microseconds"]["p10"], BUDGET_MICROSECONDS * arguments.batch / 16
    if took > allowed:
        raise SystemExit(f"the metrics of a step take {took} microseconds, more than {allowed}")


if __name__ == "__main__":
    main()
