"""The measurements of quantized weights run, in little: in this process, and on a served checkpoint in shards."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_quantized, bench_real_size
from benchmarks.machine import about
from benchmarks.models import GEOMETRY, write_real_size_model
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import describe_model


def small_geometry() -> dict[str, Any]:
    """That of `bench`, but narrow."""
    geometry = json.loads(GEOMETRY.read_text())
    vision = {"image_size": 56, "hidden_size": 32, "intermediate_size": 64, "vision_output_dim": 64}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return {
        "vision_config": geometry["vision_config"] | vision,
        "text_config": geometry["text_config"] | text | {"vocab_size": 9000},
        "trim": {"k_ratio": 0.2},
    }


def test_steps_and_prefills_take_turns(tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path, Geometry())
    rows = bench_quantized.measure(tmp_path, "bfloat16", 2)
    assert [(row["quantize"], row["rows"]) for row in rows] == [
        (quantize, num_rows) for quantize in ("int8", "int4") for num_rows in (1, 16, 32, 64)
    ]
    assert all(row["milliseconds"]["p10"] > 0 and row["over_floor"] > 0 for row in rows)
    assert "| int4, bfloat16 | 64 |" in bench_quantized.table({"rows": rows, **about(1)})


def test_a_checkpoint_in_shards_is_served_with_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "model", tmp_path / "real_size.json"
    write_real_size_model(folder, small_geometry(), shard_bytes=1 << 20)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 1
    assert describe_model(ModelConfig(model=str(folder)), EngineConfig()).dtype == "bfloat16"
    options = ["--model", str(folder), "--quantize", "int4", "--tokens", "4", "--threads", "1", "--out", str(file)]
    monkeypatch.setattr("sys.argv", ["bench_real_size", *options])
    bench_real_size.main()
    report = json.loads(file.read_text())
    assert [row["quantize"] for row in report["rows"]] == ["int4"]
    assert report["rows"][0]["peak_bytes"] > report["rows"][0]["step_weight_bytes"]
    assert "| int4 |" in bench_real_size.table(report)
