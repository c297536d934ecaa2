"""`trimserve batch` beside bare clients of the same server, in turns; and a batch that is killed three times.

    python -m benchmarks.bench_batch

The bare clients have all requests ready and throw the answers away: what they get is the served throughput. The batch
is the whole command, from its start to its end. The killed batch must have every line once, with the bare clients'
text. Fails if it has not, or if the batch reaches less than 95 % of the served throughput.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.serve.report import about, write_json
from benchmarks.serve.service import running_server
from benchmarks.serve.workload import draw_picture
from trimserve.batch.lines import parse, read_lines
from trimserve.client import channel_options
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

OUT: Final = Path(__file__).with_name("results") / "batch.json"
LEAST_RATIO: Final = 0.95
CONCURRENCY: Final = 32
NUM_KILLS: Final = 3
NUM_IMAGES: Final = 50
QUESTIONS: Final = ("What colour is the star?", "How many hearts are there?", "Describe the image.", "Read the word.")
POLL_SECONDS: Final = 0.005


def main() -> None:
    """Measure, kill, check, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000, help="of the batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of each; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of each answer; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="the report; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_server(None, num_threads=1) as server:
        folder = Path(name)
        write_lines(folder, options.lines, options.max_new_tokens)
        requests = load_requests(folder)
        asyncio.run(served(server.address, requests[: len(requests) // 4]))  # the images are in the cache from now on
        rounds = [compare(server.address, folder, requests, number) for number in range(options.rounds)]
        texts = asyncio.run(served(server.address, requests))
        killed = kill_and_go_on(server.address, folder, texts)
    ratio = statistics.median(each["ratio"] for each in rounds)
    report = {
        "benchmark": "batch",
        **about(1),
        "model": "trimserve-tiny",
        "num_lines": options.lines,
        "concurrency": CONCURRENCY,
        "max_new_tokens": options.max_new_tokens,
        "rounds": rounds,
        "ratio": ratio,
        "killed": killed,
    }
    write_json(report, options.out)
    print(json.dumps(report))
    if killed["num_lost"] or killed["num_doubled"] or killed["num_other_texts"] or ratio < LEAST_RATIO:
        raise SystemExit("the batch lost or doubled lines, answered otherwise, or is too slow")


def write_lines(folder: Path, num_lines: int, max_new_tokens: int) -> None:
    """`in.jsonl`, and the images that it names."""
    rng = random.Random(0)
    for number in range(NUM_IMAGES):
        (folder / f"{number}.jpg").write_bytes(draw_picture(rng, 128))
    sampling = {"maxNewTokens": max_new_tokens, "ignoreEos": True, "temperature": 0}
    with (folder / "in.jsonl").open("w") as file:
        for number in range(num_lines):
            line = {"id": number, "prompt": rng.choice(QUESTIONS), "images": [f"{rng.randrange(NUM_IMAGES)}.jpg"]}
            print(json.dumps({**line, "sampling": sampling}), file=file)


def load_requests(folder: Path) -> list[pb.GenerateRequest]:
    """What the lines ask."""
    with (folder / "in.jsonl").open("rb") as file:
        return [parse(line, folder).request for line in read_lines(file)]


def compare(address: str, folder: Path, requests: Sequence[pb.GenerateRequest], number: int) -> dict[str, Any]:
    """Lines a second of both, one after the other; which one is first changes from round to round."""
    out = folder / f"round{number}.jsonl"
    seconds: dict[str, float] = {}
    for name in ("served", "batch") if number % 2 else ("batch", "served"):
        begin = time.monotonic()
        if name == "served":
            asyncio.run(served(address, requests))
        else:
            subprocess.run(command(address, folder, out), check=True, stderr=subprocess.DEVNULL)
        seconds[name] = time.monotonic() - begin
    rates = {name: len(requests) / taken for name, taken in seconds.items()}
    figures = {f"{name}_lines_per_second": round(rate, 2) for name, rate in rates.items()}
    return {**figures, "ratio": round(rates["batch"] / rates["served"], 4)}


async def served(address: str, requests: Sequence[pb.GenerateRequest]) -> list[str]:
    """Ask all of them by some clients at a time; the answers, in their order."""
    texts: dict[int, str] = {}
    waiting = iter(enumerate(requests))
    async with grpc.aio.insecure_channel(address, channel_options(address=address)) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def client() -> None:
            for index, request in waiting:
                texts[index] = (await stub.Generate(request)).text

        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return [texts[index] for index in range(len(requests))]


def command(address: str, folder: Path, out: Path) -> list[str]:
    """The batch, as it is typed."""
    options = ("--address", address, "--concurrency", str(CONCURRENCY))
    return [sys.executable, "-m", "trimserve", "batch", str(folder / "in.jsonl"), str(out), *options]


def kill_and_go_on(address: str, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Kill a batch a few times while it writes, let it end, and count what is wrong with its output."""
    out = folder / "killed.jsonl"
    lines_at_kill = []
    for number in range(1, NUM_KILLS + 1):
        enough = number * len(texts) // (NUM_KILLS + 1)
        with subprocess.Popen(command(address, folder, out), stderr=subprocess.DEVNULL) as process:
            while num_lines(out) < enough:
                if process.poll() is not None:
                    raise SystemExit(f"the batch ended with status {process.returncode} before it was killed")
                time.sleep(POLL_SECONDS)
            process.send_signal(signal.SIGKILL)
        lines_at_kill.append(num_lines(out))
    subprocess.run(command(address, folder, out), check=True, stderr=subprocess.DEVNULL)
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    answers = {line["id"]: line["response"]["text"] for line in found if "response" in line}
    return {
        "lines_at_kill": lines_at_kill,
        "num_lines": len(found),
        "num_lost": len(texts) - len(answers),
        "num_doubled": len(found) - len({line["index"] for line in found}),
        "num_other_texts": sum(answers.get(index) != text for index, text in enumerate(texts)),
    }


def num_lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main()
