"""Counts bytes of keys and values: what a request holds, and how many requests the same bytes hold.

    python -m benchmarks.bench_bytes [--bench-model DIR] [--out FILE]

Requests with a 4-tile image, a 1-tile image, two 4-tile images and text alone, trimmed and untrimmed: see
`serve/account.py`. The figures are bytes, not times, so the machine need not be quiet.
"""

import argparse
import asyncio
import json
from pathlib import Path

from rich.console import Console

from benchmarks.bench_model import BENCH_MODEL
from benchmarks.serve.account import Account
from benchmarks.serve.models import MODELS, under_test
from benchmarks.serve.report import about, write_json

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "bytes.json"


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    console = Console(stderr=True)
    found = []
    for name in arguments.models:
        with console.status(name):
            model = under_test(name, arguments.bench_model)
            account = Account(
                model,
                max_new_tokens=arguments.max_new_tokens,
                peers_at_once=arguments.peers_at_once,
                num_threads=arguments.threads,
            )
            found.append(asyncio.run(account.run()))
    report = {"benchmark": "bytes", **about(arguments.threads), "models": found}
    write_json(report, arguments.out)
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    add("--bench-model", type=Path, default=BENCH_MODEL, help="folder of the checkpoint; written if it is not there")
    add("--out", type=Path, default=_OUT, help="JSON file")
    add("--max-new-tokens", type=int, default=128, help="of every answer")
    add("--peers-at-once", type=int, default=8, help="4-tile requests of transformers whose bytes are the measure")
    add("--threads", type=int, default=1, help="of one op, in every process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
