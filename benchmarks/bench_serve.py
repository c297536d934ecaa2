"""Puts `trimserve serve` under load over gRPC, and transformers under the same load, in one run.

    python -m benchmarks.bench_serve [--bench-model DIR] [--rival-venv VENV] [--out DIR] [--quick]

For each model, on the same number of threads and with the same requests:

- closed loop: a fixed number of clients with one request at a time each; trimmed, untrimmed, and against transformers:
  `generate` in a process of its own, one request at a time; `generate` of as many requests at once as there are
  clients; and `transformers serve`, where an environment with `transformers[serving]` is given;
- open loop: requests come at random times, at a share of the rate that the closed loop reached;
- probes of an idle server: what the service adds to a token, and what a repeated image saves.

End tokens are ignored everywhere, so every answer has as many tokens. Results: `report.json` and `serve.png`.
"""

import argparse
import asyncio
import functools
import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.bench_model import BENCH_MODEL
from benchmarks.serve.comparison import NUM_STAGES, Comparison, Plan
from benchmarks.serve.models import MODELS, under_test
from benchmarks.serve.picture import draw_report
from benchmarks.serve.report import make_report, print_report, write_json

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "serve"
_QUICK = {"requests": 6, "concurrency": 3, "max_new_tokens": 8, "probe_images": 1, "latency_rounds": 1}
_NUM_REQUESTS = {"embedded": 64, "bench": 16}  # one at a time, `bench` takes transformers ten seconds a request


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    console = Console(stderr=True)
    models = [under_test(name, arguments.bench_model) for name in arguments.models]
    plans = [_plan(arguments, model.name) for model in models]
    start = time.monotonic()
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for model, plan in zip(models, plans, strict=True):
            task = progress.add_task(model.name, total=NUM_STAGES, completed=-1)
            begin = functools.partial(_show_stage, progress, task, model.name)
            found.append(asyncio.run(Comparison(model, plan, arguments.rival_venv, begin).run()))
            progress.update(task, description=model.name, completed=NUM_STAGES)
    report = make_report(found, plans, time.monotonic() - start)
    write_json(report, arguments.out / "report.json")
    draw_report(report, arguments.out / "serve.png")
    print_report(report, console)
    print(json.dumps(report))


def _show_stage(progress: Progress, task: TaskID, model: str, stage: str) -> None:
    progress.update(task, description=f"{model}: {stage}", advance=1)


def _plan(arguments: argparse.Namespace, model: str) -> Plan:
    return Plan(
        num_requests=arguments.requests or _NUM_REQUESTS[model],
        concurrency=arguments.concurrency,
        max_new_tokens=arguments.max_new_tokens,
        repeated_share=arguments.repeated_share,
        open_loop_load=arguments.open_loop_load,
        num_probe_images=arguments.probe_images,
        latency_rounds=arguments.latency_rounds,
        num_threads=arguments.threads,
        seed=arguments.seed,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    add("--bench-model", type=Path, default=BENCH_MODEL, help="folder of the checkpoint; written if it is not there")
    add("--rival-venv", type=Path, help="environment with transformers[serving]; unset leaves that server out")
    add("--out", type=Path, default=_OUT, help="folder of report.json and serve.png")
    add("--requests", type=int, help=f"of each load; default: {_NUM_REQUESTS}")
    add("--concurrency", type=int, default=16, help="clients, and requests of one of transformers' batches")
    add("--max-new-tokens", type=int, default=128, help="of every answer, at least 2")
    add("--repeated-share", type=float, default=0.5, help="of the images, in [0, 1)")
    add("--open-loop-load", type=float, default=0.7, help="rate as a share of the closed loop's")
    add("--probe-images", type=int, default=3, help="new images that the probe asks about, of each size")
    add("--latency-rounds", type=int, default=5, help="turns of service and bare model")
    add("--threads", type=int, default=1, help="of one op, in every process; leave a core to the load generator")
    add("--seed", type=int, default=0, help="of the workloads")
    add("--quick", action="store_true", help="little of everything, to see whether it works; sets the numbers above")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(_QUICK)
    return arguments


if __name__ == "__main__":
    main()
