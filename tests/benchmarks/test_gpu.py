"""The benchmark of a GPU, on the CPU with a small model: both engines agree, and every figure is there."""

from pathlib import Path

from transformers import MllamaConfig

from benchmarks.bench_gpu import SETTINGS, Plan, measure
from tests.model.random_checkpoint import Geometry, save_random_checkpoint


def test_both_engines_agree_and_every_phase_is_timed(tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path, Geometry())
    plan = Plan(MllamaConfig.from_pretrained(tmp_path), "cpu", batches=(1, 3), seconds=0.0)
    written: list[int] = []
    report = measure(plan, lambda known: written.append(len(known["rows"])))
    phases = [("vision", 1), ("prefill", 1), ("decode", 1), ("decode", 3)]
    rows = report["rows"]
    assert written == [*range(1, len(rows) + 1)]
    assert [(row["phase"], row["batch"]) for row in rows] == phases * (len(SETTINGS) + 1)
    off, default = rows[0], rows[4]
    assert 0 < default["cross_rows"] <= off["cross_rows"] / 2
    assert report["cosine_of_logits"] > 0.99
    assert all(row["speedup"] > 0 for row in rows if row["engine"] == "trimserve")
