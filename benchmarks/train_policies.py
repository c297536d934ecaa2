"""Trains what policies learn, on the embedded model, and compares it with choosing and merging at as many rows.

    python -m training.heldout --split train --seed 1 --questions 12000 --out out/train
    python -m training.heldout --questions 2000 --out out/heldout
    python -m benchmarks.train_policies [--train out/train] [--held-out out/heldout] [--files out/learned]

A file that is there is not trained again. Of every share of the rows the folder gets a report like that of `trimserve
eval`, and `training.json` says what training came to. Nothing here is a time: it may run beside other work.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from benchmarks.report import write_json
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.progress import progress
from trimserve.model.loading import load_model

__all__ = ["ROWS", "main"]

ROWS: Final = {
    "11": {"quecc": 7, "tokenpacker": 7, "flashsloth": 7, "registers": 7, "wico": 7},
    "22": {"quecc": 14, "tokenpacker": 14, "flashsloth": 14, "registers": 14, "wico": 13},
}
"""Rows of a tile of 65 features that each method makes, by the share in percent that they are at most; windows come to
13."""

_MERGED: Final = {"11": (0.016, 0.09), "22": (0.12, 0.09)}
"""What stays of an image and what the rest is merged into, together about as many rows."""

_CHOOSING: Final = ("cls", "vispruner", "gprune", "trimmed", "sparsevlm", "mmr")
_ROUTER: Final = "exit"
_STEPS: Final = 400
_OUT: Final = Path(__file__).parent / "results" / "policies" / "learned"


def main() -> None:
    """Train, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("out/train"))
    parser.add_argument("--held-out", type=Path, default=Path("out/heldout"))
    parser.add_argument("--files", type=Path, default=Path("out/learned"))
    parser.add_argument("--threads", type=int, default=1, help="of one op")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    router = _trained(arguments, _ROUTER, 0)
    trained = [_card(router)]
    for share, methods in ROWS.items():
        files = [_trained(arguments, method, rows) for method, rows in methods.items()]
        trained += map(_card, files)
        config = ModelConfig(compressor=(*files, router))
        questions = load_questions(arguments.held_out / "questions.jsonl")
        with progress(f"questions, {share} %", len(questions)) as advance:
            trims = [*_trims(share)]
            report = measure_curve(InProcess(load_model(config, EngineConfig())), questions, trims, on_question=advance)
        (arguments.out / share).mkdir(parents=True, exist_ok=True)
        (arguments.out / share / "report.json").write_text(report.to_json())
    write_json({"trained": trained}, arguments.out / "training.json")


def _trained(arguments: argparse.Namespace, method: str, rows: int) -> Path:
    """The file of a method, trained now if it is not there."""
    file: Path = arguments.files / f"{method}-{rows}.safetensors"
    if not file.exists():
        command = ["train-compressor", "--method", method, "--rows", rows, "--steps", _STEPS, "--out", file]
        data = ["--data", arguments.train / "questions.jsonl", "--cache", arguments.files / "cache"]
        threads = ["--num-threads", arguments.threads]
        asked = [*map(str, (*command, *data, *threads))]
        subprocess.run([sys.executable, "-m", "trimserve", *asked], check=True)
    return file


def _card(file: Path) -> dict[str, Any]:
    """What a training came to."""
    with safe_open(file, framework="pt") as content:
        card = json.loads(content.metadata()["trimserve"])
        sizes = [content.get_tensor(name).numel() for name in content.keys()]  # noqa: SIM118
    (_, before), (_, after) = card["curve"][0], card["curve"][-1]
    told = {"method": card["method"], "rows": card["rows"], "steps": card["training"]["steps"]}
    return {**told, "weights": sum(sizes), "loss_before": before, "loss_after": after}


def _trims(share: str) -> Iterator[TrimRequest]:
    """What is asked: learned rows first, then choosing and merging."""
    for method in (*ROWS[share], "pool", _ROUTER):
        yield TrimRequest(policy=method)
    kept, merged = _MERGED[share]
    for policy in _CHOOSING:
        yield TrimRequest(policy=policy, budget=FixedRatio(kept), merge_ratio=merged)
    whole = FixedRatio(int(share) / 100)
    yield TrimRequest(policy="visiondrop", budget=whole)
    yield TrimRequest(policy="sparsevlm", budget=whole, parameters={"recycle_ratio": 1.0})


if __name__ == "__main__":
    main()
