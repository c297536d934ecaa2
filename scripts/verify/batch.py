"""`trimserve batch` beside bare clients of the same server, in turns; and a batch that is killed three times.

    python -m scripts.verify.batch [--lines 2000] [--rounds 3] [--max-new-tokens 16] [--out FILE]

The bare clients have all requests ready and throw the answers away: what they get is the served throughput. The batch
is the whole command, from its start to its end. The killed batch must have every line once, with the bare clients'
text. Fails if it has not, or if the batch reaches less than 95 % of the served throughput.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import grpc

from benchmarks.load import draw_picture
from benchmarks.measure import seconds_of
from benchmarks.report import command_line, finish
from benchmarks.service import running_server
from trimserve.batch.lines import parse, read_lines
from trimserve.client import channel_options
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

__all__ = ["in_pairs", "main"]

_LEAST_RATIO: Final = 0.95
_CONCURRENCY: Final = 32
_NUM_KILLS: Final = 3
_NUM_IMAGES: Final = 50
_QUESTIONS: Final = ("What colour is the star?", "How many hearts are there?", "Describe the image.", "Read the word.")
_POLL_SECONDS: Final = 0.005


def _write_lines(folder: Path, num_lines: int, max_new_tokens: int) -> list[pb.GenerateRequest]:
    """Write `in.jsonl` and the images that it names; what the lines ask."""
    rng = random.Random(0)
    for number in range(_NUM_IMAGES):
        (folder / f"{number}.jpg").write_bytes(draw_picture(rng, 128))
    sampling = {"maxNewTokens": max_new_tokens, "ignoreEos": True, "temperature": 0}
    with (folder / "in.jsonl").open("w") as file:
        for number in range(num_lines):
            line = {"id": number, "prompt": rng.choice(_QUESTIONS), "images": [f"{rng.randrange(_NUM_IMAGES)}.jpg"]}
            print(json.dumps({**line, "sampling": sampling}), file=file)
    with (folder / "in.jsonl").open("rb") as file:
        return [parse(line, folder).request for line in read_lines(file)]


async def _served(address: str, requests: Sequence[pb.GenerateRequest]) -> list[str]:
    """Ask all of them by some clients at a time; the answers, in their order."""
    texts: dict[int, str] = {}
    waiting = iter(enumerate(requests))
    async with grpc.aio.insecure_channel(address, channel_options(address=address)) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def client() -> None:
            for index, request in waiting:
                texts[index] = (await stub.Generate(request)).text

        await asyncio.gather(*(client() for _ in range(_CONCURRENCY)))
    return [texts[index] for index in range(len(requests))]


def _command(address: str, folder: Path, out: str) -> list[str]:
    """The batch, as it is typed."""
    flags = ("--address", address, "--concurrency", str(_CONCURRENCY))
    return [sys.executable, "-m", "trimserve", "batch", str(folder / "in.jsonl"), str(folder / out), *flags]


def _run_batch(address: str, folder: Path, out: str) -> None:
    subprocess.run(_command(address, folder, out), check=True, stderr=subprocess.DEVNULL)


def _kill_and_go_on(address: str, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Kill a batch a few times while it writes, let it end, and count what is wrong with its output."""
    out, lines_at_kill = folder / "killed.jsonl", []
    for number in range(1, _NUM_KILLS + 1):
        enough = number * len(texts) // (_NUM_KILLS + 1)
        with subprocess.Popen(_command(address, folder, out.name), stderr=subprocess.DEVNULL) as process:
            while _num_lines(out) < enough:
                if process.poll() is not None:
                    raise SystemExit(f"the batch ended with status {process.returncode} before it was killed")
                time.sleep(_POLL_SECONDS)  # a file tells nobody that it has grown
            process.send_signal(signal.SIGKILL)
        lines_at_kill.append(_num_lines(out))
    _run_batch(address, folder, out.name)
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    answers = {line["id"]: line["response"]["text"] for line in found if "response" in line}
    return {
        "lines_at_kill": lines_at_kill,
        "num_lines": len(found),
        "num_lost": len(texts) - len(answers),
        "num_doubled": len(found) - len({line["index"] for line in found}),
        "num_other_texts": sum(answers.get(index) != text for index, text in enumerate(texts)),
    }


def _num_lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def in_pairs(one: Callable[[int], float], other: Callable[[int], float], num_pairs: int) -> list[tuple[float, float]]:
    """Figures of two that are measured back to back, so that both meet the same moments of the machine.

    Args:
        one: gives a figure; gets the number of the pair: 0 warms up and does not count.
        other: the same; it is first in every second pair.
        num_pairs: at least 1, beside the one that warms up.
    """
    pairs = []
    for number in range(num_pairs + 1):
        if number % 2:
            found = one(number), other(number)
        else:
            second = other(number)
            found = one(number), second
        pairs.append(found)
    return pairs[1:]


def main() -> None:
    """Measure, kill, check, write down."""
    arguments = command_line(__doc__, "batch.json", lines=2000, rounds=3, max_new_tokens=16)
    num_lines = arguments.lines
    with tempfile.TemporaryDirectory() as name, running_server(None, num_threads=arguments.threads) as server:
        address, folder = server.address, Path(name)
        requests = _write_lines(folder, num_lines, arguments.max_new_tokens)
        pairs = in_pairs(
            lambda _: num_lines / seconds_of(lambda: asyncio.run(_served(address, requests))),
            lambda number: num_lines / seconds_of(lambda: _run_batch(address, folder, f"round{number}.jsonl")),
            arguments.rounds,
        )
        texts = asyncio.run(_served(address, requests))
        killed = _kill_and_go_on(address, folder, texts)
    named = ("served_lines_per_second", "batch_lines_per_second", "ratio")
    rounds = [
        dict(zip(named, (round(one, 2), round(other, 2), round(other / one, 4)), strict=True)) for one, other in pairs
    ]
    ratio = round(median(other / one for one, other in pairs), 4)
    asked = {"num_lines": num_lines, "concurrency": _CONCURRENCY, "max_new_tokens": arguments.max_new_tokens}
    figures = {"model": "trimserve-tiny", **asked, "rounds": rounds, "ratio": ratio, "killed": killed}
    finish(arguments, figures)
    if killed["num_lost"] or killed["num_doubled"] or killed["num_other_texts"] or ratio < _LEAST_RATIO:
        raise SystemExit("the batch lost or doubled lines, answered otherwise, or is too slow")


if __name__ == "__main__":
    main()
