"""The measurement of generation runs, in little, on the embedded model; bytes and products of a step are counted."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_generate
from benchmarks.floor import Floor, StepShape
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.model.loading import embedded_model_folder


def test_every_phase_gets_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_generate", "--quick", "--out", str(tmp_path / "report.json")])
    bench_generate.main()
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert {row["phase"] for row in rows} == {"vision", "prefill", "decode"}
    assert all(0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"] for row in rows)
    steps = [row for row in rows if row["phase"] == "decode" and row["engine"] == "trimserve"]
    assert len(steps) == 3 * 3 * 2  # variants, settings, batches
    for row in steps:
        floor = max(row["bytes_ms"], row["products_ms"])
        assert row["times_floor"] == pytest.approx(row["ms"]["median"] / floor, rel=0.05)
    kept = {row["setting"]: row["cross_rows"] for row in steps}
    assert kept["off"] > kept["default"] > kept["one_tile"]
    table = bench_generate.table(report)
    assert table.count("transformers, bfloat16") == 2 * 2
    assert f"({steps[0]['times_floor']:.2f})" in table


def test_a_step_reads_all_weights_but_those_of_features_and_most_of_the_embedding(tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path, Geometry())
    shape = StepShape.of_checkpoint(tmp_path, torch.float32, "none")
    int8 = StepShape.of_checkpoint(tmp_path, torch.float32, "int8")
    assert int8.linears == shape.linears
    num_products = sum(outputs * inputs for outputs, inputs in shape.linears)
    others = shape.weight_bytes - 4 * num_products  # norms and gates
    assert 0 < others < 0.05 * shape.weight_bytes
    assert int8.weight_bytes == others + num_products + 4 * sum(outputs for outputs, _ in shape.linears)
    int4 = StepShape.of_checkpoint(tmp_path, torch.float32, "int4")
    assert others + 0.5 * num_products < int4.weight_bytes < int8.weight_bytes


def test_the_floor_is_the_larger_of_bytes_and_products() -> None:
    shape = StepShape.of_checkpoint(embedded_model_folder(), torch.float32, "none")
    slow_memory = Floor.of_step(shape, 2, kv_bytes=1000, bytes_per_second=1e6)
    assert slow_memory.num_bytes == shape.weight_bytes + 1000
    assert slow_memory.ms == slow_memory.bytes_ms == pytest.approx(slow_memory.num_bytes / 1e3)
    fast_memory = Floor.of_step(shape, 2, kv_bytes=1000, bytes_per_second=1e30)
    assert fast_memory.ms == fast_memory.products_ms > 0
