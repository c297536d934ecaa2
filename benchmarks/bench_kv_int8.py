"""Keys and values as int8 beside the model's own dtype: decode steps of `bench`, and answers of the embedded model.

    python -m benchmarks.bench_kv_int8 [--pairs 15] [--questions 1000] [--batches 1 32] [--out FILE]

Steps are those of an untrimmed question about four tiles, in bfloat16; the two ways take turns, and the ratio has the
95 % interval of the median of the pairs. Answers are greedy, untrimmed and with the trimming that the checkpoint
recommends, in float32, and counted when not a letter changes.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch

from benchmarks.held_out import held_out
from benchmarks.measure import medians, seconds_in_pairs, speedup
from benchmarks.models import BENCH_MODEL, bench_model
from benchmarks.ours import SETTINGS, Ours, recommended
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated, times
from trimserve.config import EngineConfig, KvDtype, ModelConfig
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.in_process import InProcess
from trimserve.model.loading import load_model

__all__ = ["main", "table"]

_WAYS: Final[tuple[KvDtype, ...]] = ("auto", "int8")


def _steps(folder: Path, batches: Sequence[int], num_pairs: int) -> list[dict[str, Any]]:
    asked = [Ours.load(folder, max(batches), dtype="bfloat16", kv_dtype=way).ask(SETTINGS["off"]) for way in _WAYS]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        own, int8 = (each.step(batch) for each in asked)
        pairs = seconds_in_pairs(own, int8, num_pairs)
        own_seconds, int8_seconds = medians(pairs, 6)
        bytes_ratio = round(asked[1].kv_bytes(batch) / asked[0].kv_bytes(batch), 4)
        row = {"batch": batch, "bfloat16_ms": round(1e3 * own_seconds, 3), "int8_ms": round(1e3 * int8_seconds, 3)}
        noted(rows, row | speedup(pairs) | {"bytes_ratio": bytes_ratio})
    return rows


def _answers(num_questions: int) -> dict[str, Any]:
    with held_out(num_questions) as questions:
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
    columns: Columns = {
        "batch": "{batch}",
        "bfloat16, ms": "{bfloat16_ms:.1f}",
        "int8, ms": "{int8_ms:.1f}",
        "times as fast [95 %]": times,
        "bytes of KV": "{bytes_ratio:.1%}",
    }
    unchanged = report["answers"]["unchanged"]
    told = (
        f"Of {report['answers']['num_questions']:,} answers of the embedded model, {unchanged['untrimmed']:.1%} "
        f"untrimmed and {unchanged['trimmed']:.1%} trimmed stay the same to the letter."
    )
    return "\n\n".join([tabulated(report["steps"], columns, words=0), told, origin(report)])


@torch.inference_mode()
def main() -> None:
    """Measure and write."""
    options = {"bench_model": BENCH_MODEL, "pairs": 15, "batches": [1, 32], "questions": 1000}
    arguments = command_line(__doc__, "kv_int8.json", **options)
    steps = _steps(bench_model(arguments.bench_model), arguments.batches, arguments.pairs)
    finish(arguments, {"steps": steps, "answers": _answers(arguments.questions)})


if __name__ == "__main__":
    main()
