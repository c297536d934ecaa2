"""Keys and values as int8 beside the model's own dtype: decode steps of `bench`, and answers of the embedded model.

    python -m benchmarks.bench_kv_int8 [--pairs 15] [--questions 1000] [--batches 1 32] [--out FILE]

Steps are those of an untrimmed question about four tiles, in bfloat16; the two ways take turns, and the ratio has the
95 % interval of the median of the pairs. Answers are greedy, untrimmed and with the trimming that the checkpoint
recommends, in float32, and counted when not a letter changes. The last line of standard output is the report.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.bench_checkouts import interval
from benchmarks.bench_model import BENCH_MODEL, write_bench_model
from benchmarks.generate.ours import Ours
from benchmarks.generate.setting import SETTINGS
from benchmarks.serve.report import about, write_json
from training.heldout import write_held_out
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, KvDtype, ModelConfig
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.model.loading import load_model

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "kv_int8.json"
_WAYS: Final[tuple[KvDtype, ...]] = ("auto", "int8")


@torch.inference_mode()
def main() -> None:
    """Measure, write, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="steps of each way, at least 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences of a step")
    parser.add_argument("--questions", type=int, default=1000, help="of the embedded model")
    parser.add_argument("--bench-model", type=Path, default=BENCH_MODEL, help="folder; written when it is not there")
    parser.add_argument("--threads", type=int, default=1, help="of one op")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.bench_model.exists():
        write_bench_model(arguments.bench_model)
    report = {
        "benchmark": "kv_int8",
        **about(arguments.threads),
        "steps": _steps(arguments.bench_model, arguments.batches, arguments.pairs),
        "answers": _answers(arguments.questions),
    }
    write_json(report, arguments.out)
    print(json.dumps(report))


def _steps(folder: Path, batches: Sequence[int], num_pairs: int) -> list[dict[str, Any]]:
    untrimmed = next(setting for setting in SETTINGS if setting.name == "off")
    ways = [Ours(folder, "bfloat16", "none", max_kept_fraction=None, most=max(batches), kv_dtype=way) for way in _WAYS]
    asked = [ours.ask(untrimmed) for ours in ways]
    rows = []
    for batch in batches:
        calls = [each.step(batch) for each in asked]
        pairs = _in_turn(calls, num_pairs)
        ratios = [own / int8 for own, int8 in pairs]
        row = {
            "batch": batch,
            "bfloat16_ms": round(statistics.median(own for own, _ in pairs) * 1e3, 3),
            "int8_ms": round(statistics.median(int8 for _, int8 in pairs) * 1e3, 3),
            "speedup": round(statistics.median(ratios), 3),
            "interval": interval(ratios),
            "bytes_ratio": round(asked[1].kv_bytes(batch) / asked[0].kv_bytes(batch), 4),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _in_turn(calls: Sequence[Callable[[], object]], num_pairs: int) -> list[tuple[float, float]]:
    """Seconds of both calls, one after the other."""
    pairs = []
    for call in calls:
        call()
    for _ in range(num_pairs):
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        pairs.append((seconds[0], seconds[1]))
    return pairs


def _answers(num_questions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), num_questions))
        own, int8 = (_texts(questions, way) for way in _WAYS)
    settings = ("untrimmed", "trimmed")
    unchanged = {
        name: round(statistics.mean(a[column] == b[column] for a, b in zip(own, int8, strict=True)), 4)
        for column, name in enumerate(settings)
    }
    return {"model": "embedded", "num_questions": len(questions), "unchanged": unchanged}


def _texts(questions: Sequence[Question], kv_dtype: KvDtype) -> list[list[str]]:
    """Of each question the untrimmed and the trimmed answer."""
    model = load_model(ModelConfig(kv_dtype=kv_dtype), EngineConfig())
    trimmed = TrimRequest(k_ratio=model.info.default_k_ratio, merge_ratio=model.info.default_merge_ratio)
    return [[answer.text for answer in answers] for answers in InProcess(model).answers(questions, [trimmed])]


if __name__ == "__main__":
    main()
