"""The benchmark of a GPU, with a small model on the CPU and on a pretended GPU: both engines agree, and both end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MllamaConfig

from benchmarks import bench_gpu
from benchmarks.bench_gpu import measure
from benchmarks.ours import SETTINGS
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.pretended.runtime import pretended_device
from trimserve.config import Device


def report_of(folder: Path, device: Device) -> dict[str, Any]:
    """What is measured."""
    save_random_checkpoint(folder, Geometry())
    return measure(MllamaConfig.from_pretrained(folder), device, 0.0, batches=(1, 3))


def test_both_engines_agree_and_every_phase_is_timed(tmp_path: Path) -> None:
    report = report_of(tmp_path, "cpu")
    phases = [("vision", 1), ("prefill", 1), ("decode", 1), ("decode", 3)]
    rows = report["rows"]
    assert [(row["phase"], row["batch"]) for row in rows] == phases * (len(SETTINGS) + 1)
    off, default = rows[0], rows[4]
    assert 0 < default["cross_rows"] <= off["cross_rows"] / 2
    assert report["cosine_of_logits"] > 0.99
    assert all(row["times_floor"] > 0 for row in rows if row["engine"] == "trimserve" and row["phase"] == "decode")


def test_it_runs_to_its_end_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(bench_gpu, "bandwidth", lambda *_: 1e9)  # of memory that is not there
    with pretended_device() as device:
        report = report_of(tmp_path, "cuda")
    assert len(report["rows"]) == 4 * (len(SETTINGS) + 1)
    assert report["cosine_of_logits"] > 0.99
    assert not [line for line in device.counts.cudnn_attention if line.startswith("trimserve/")]
