"""Keys and values as int8 beside the model's own dtype: decode steps of `bench`, and answers of the embedded model.

    python -m benchmarks.bench_kv_int8 [--pairs 15] [--questions 1000] [--batches 1 32] [--out FILE]

Steps are those of an untrimmed question about four tiles, in bfloat16; the two ways take turns, and the ratio has the
95 % interval of the median of the pairs. Answers are greedy, untrimmed and with the trimming that the checkpoint
recommends, in float32, and counted when not a letter changes. The last line of standard output is the report.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import torch

from benchmarks.measure import in_pairs, interval, seconds_of
from benchmarks.models import bench_model
from benchmarks.ours import SETTINGS, Ours, recommended
from benchmarks.report import finish, markdown, options, origin, times
from training.heldout import write_held_out
from trimserve.config import EngineConfig, KvDtype, ModelConfig
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.model.loading import load_model

__all__ = ["main", "table"]

_WAYS: Final[tuple[KvDtype, ...]] = ("auto", "int8")


def _steps(folder: Path, batches: Sequence[int], num_pairs: int) -> list[dict[str, Any]]:
    asked = [Ours.load(folder, max(batches), dtype="bfloat16", kv_dtype=way).ask(SETTINGS["off"]) for way in _WAYS]
    rows = []
    for batch in batches:
        own, int8 = (each.step(batch) for each in asked)
        pairs = in_pairs(partial(_seconds, own), partial(_seconds, int8), num_pairs)
        ratios = [one / other for one, other in pairs]
        row = {
            "batch": batch,
            "bfloat16_ms": round(median(one for one, _ in pairs) * 1e3, 3),
            "int8_ms": round(median(other for _, other in pairs) * 1e3, 3),
            "speedup": round(median(ratios), 3),
            "interval": interval(ratios),
            "bytes_ratio": round(asked[1].kv_bytes(batch) / asked[0].kv_bytes(batch), 4),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _seconds(step: Callable[[], object], _: int) -> float:
    return seconds_of(step)


def _answers(num_questions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), num_questions))
        own, int8 = (_texts(questions, way) for way in _WAYS)
    unchanged = {
        name: round(mean(a[column] == b[column] for a, b in zip(own, int8, strict=True)), 4)
        for column, name in enumerate(("untrimmed", "trimmed"))
    }
    return {"model": "embedded", "num_questions": len(questions), "unchanged": unchanged}


def _texts(questions: Sequence[Question], kv_dtype: KvDtype) -> list[list[str]]:
    """Of each question the untrimmed and the trimmed answer."""
    model = load_model(ModelConfig(kv_dtype=kv_dtype), EngineConfig())
    found = InProcess(model).answers(questions, [recommended(model.info)])
    return [[answer.text for answer in answers] for answers in found]


def table(report: dict[str, Any]) -> str:
    """Decode steps with int8 keys and values beside bfloat16, and answers that stay the same, as Markdown."""
    head = ["batch", "bfloat16, ms", "int8, ms", "times as fast [95 %]", "bytes of KV"]
    rows = [
        [row["batch"], f"{row['bfloat16_ms']:.1f}", f"{row['int8_ms']:.1f}", times(row), f"{row['bytes_ratio']:.1%}"]
        for row in report["steps"]
    ]
    unchanged = report["answers"]["unchanged"]
    told = (
        f"Of {report['answers']['num_questions']:,} answers of the embedded model, {unchanged['untrimmed']:.1%} "
        f"untrimmed and {unchanged['trimmed']:.1%} trimmed stay the same to the letter."
    )
    return "\n\n".join([markdown(head, rows, words=0), told, origin(report)])


@torch.inference_mode()
def main() -> None:
    """Measure, write, tell."""
    parser = options(__doc__, "kv_int8.json", threads=True, bench_model=True)
    parser.add_argument("--pairs", type=int, default=15, help="steps of each way, at least 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences of a step")
    parser.add_argument("--questions", type=int, default=1000, help="of the embedded model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = _steps(bench_model(arguments.bench_model), arguments.batches, arguments.pairs)
    finish("kv_int8", arguments.out, {"steps": steps, "answers": _answers(arguments.questions)}, arguments.threads)


if __name__ == "__main__":
    main()
