"""What keys and values kept beside an image are worth: the first token of another question on it.

    python -m benchmarks.bench_repeated [--pairs 15] [--dtype float32] [--bench-model DIR] [--out FILE]

Engines over one `bench` model take turns, so that all meet the same moments of the machine. Each is asked about a
four-tile image that is new, and then another question about the same image, which is what is measured:

- `before`: the image cache keeps visual features only, and the second question projects them again, by torch's product,
  as it was before keys and values were kept;
- `features`: the same, by the product that is taken now;
- `kv`: the image cache keeps what the cross-attention layers made of them, too.

The last two must give the same tokens. Engines are driven without service and sockets, on one thread; seconds are the
thread's own, so that other work on the machine does not count. They begin when the engine has the image's pixels; what
comes before, file to pixels to tiles, is the same in all and is told apart.
"""

import argparse
import json
import random
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch

from benchmarks.bench_checkouts import interval
from benchmarks.bench_model import BENCH_MODEL, max_kept_fraction, write_bench_model
from benchmarks.serve.report import about, write_json
from benchmarks.serve.workload import draw_picture
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.projection import Projection

__all__ = ["main"]

_OUT: Final = Path(__file__).parent / "results" / "repeated.json"
_QUESTIONS: Final = (
    "What do you see?",
    "Which colours are there, and where?",
    "How many objects are in the upper half of the picture?",
    "Is there any text in it? Read it.",
)
_COMPARED: Final = ("before", "features", "kv")
_CACHE_BYTES: Final = 2**29  # the default
_NUM_TOKENS: Final = 8


@dataclass(slots=True)
class _Output:
    """The tokens of one request."""

    token_ids: list[int] = field(default_factory=list)
    first_at: float = 0.0
    """`time.thread_time()` at the first token."""

    def __call__(self, chunk: GenerationChunk | TrimserveError) -> None:
        if isinstance(chunk, TrimserveError):
            raise chunk
        if isinstance(chunk, TokenDelta):
            self.first_at = self.first_at or time.thread_time()
            self.token_ids += chunk.token_ids


class _Engine:
    """One of those that are compared, which remembers images in its own cache."""

    def __init__(self, model: Mllama, name: str) -> None:
        self.name = name
        executor = LocalExecutor(model, _CACHE_BYTES)
        if name != "kv":
            executor._images.keep_keys_values = lambda key, owner: None  # type: ignore[method-assign]  # noqa: ARG005
        self.engine = Engine(model, executor, EngineConfig(max_batch=1, prefill_slice_seconds=1e6))

    def ask(self, request: GenerationRequest) -> tuple[float, float, list[int]]:
        """Seconds of the preparation and until the first token, and all tokens."""
        output, began = _Output(), time.thread_time()
        sequence = self.engine.prepare(request, output, time.monotonic())
        prepared = time.thread_time()
        self.engine.add(sequence)
        as_before = patch.object(Projection, "row_by_row", Projection.__call__)
        with as_before if self.name == "before" else nullcontext():
            while self.engine.has_work:
                self.engine.step()
        return prepared - began, output.first_at - prepared, output.token_ids


def _request(picture: ImageFile, question: str, trim: TrimRequest) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return GenerationRequest("repeated", ChatPrompt((Message("user", (picture, Text(question))),)), sampling, trim)


def _measure(model: Mllama, name: str, trim: TrimRequest, num_pairs: int) -> dict[str, Any]:
    rng, engines = random.Random(0), [_Engine(model, each) for each in _COMPARED]
    seconds: dict[str, list[float]] = {each: [] for each in (*_COMPARED, "new image", "preparation")}
    for number in range(1 + num_pairs):  # the first warms up
        picture = ImageFile(draw_picture(rng, 2 * model.info.tile_size))
        first, other = rng.sample(_QUESTIONS, 2)
        answers = {}
        for engine in engines if number % 2 else reversed(engines):
            seconds["new image"].append(engine.ask(_request(picture, first, trim))[1])
            preparation, until_first, answers[engine.name] = engine.ask(_request(picture, other, trim))
            seconds["preparation"].append(preparation)
            seconds[engine.name].append(until_first)
        if answers["features"] != answers["kv"]:
            raise AssertionError(f"{name}: keys and values that were kept changed an answer")
    row: dict[str, Any] = {"case": name, "pairs": num_pairs}
    for each, samples in seconds.items():
        row[f"{each.replace(' ', '_')}_seconds"] = round(
            statistics.median(samples[len(samples) // (1 + num_pairs) :]), 4
        )
    for other in ("before", "features"):
        ratios = [kv / without for kv, without in zip(seconds["kv"][1:], seconds[other][1:], strict=True)]
        row[f"of_{other}"] = {"ratio": round(statistics.median(ratios), 4), "interval": interval(ratios)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Print a row for each case; the last line is the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--bench-model", type=Path, default=BENCH_MODEL, help="written if it is not there")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not (arguments.bench_model / "config.json").exists():
        write_bench_model(arguments.bench_model)
    config = ModelConfig(model=str(arguments.bench_model), dtype=arguments.dtype)
    model = load_model(config, EngineConfig(image_cache_bytes=_CACHE_BYTES))  # type: ignore[arg-type]  # a number of bytes
    trimmed = TrimRequest(k_ratio=model.info.default_k_ratio, max_kept_fraction=max_kept_fraction())
    cases = {"trimmed": trimmed, "untrimmed": TrimRequest(enabled=False)}
    rows = [_measure(model, name, trim, arguments.pairs) for name, trim in cases.items()]
    report = {"benchmark": "repeated", **about(1), "dtype": arguments.dtype, "rows": rows}
    write_json(report, arguments.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
