"""The measurement of precisions runs, in little; its table shows every precision."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_precision
from benchmarks.generate.tables import generate_tables, precision_table, quantized_table, real_size_table


def test_every_precision_is_compared_with_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "precision.json"
    monkeypatch.setattr("sys.argv", ["bench_precision", "--questions", "4", "--out", str(file)])
    bench_precision.main()
    report = json.loads(file.read_text())
    exact, *others = [row for row in report["rows"] if row["setting"] == "untrimmed"]
    assert (exact["dtype"], exact["quantize"], exact["divergence_nats"]["value"]) == ("float32", "none", 0)
    assert len(others) == 5
    for row in others:
        assert 0 < row["divergence_nats"]["value"] < 0.1
        assert row["weight_bytes"] < exact["weight_bytes"]
    assert precision_table(report).count("int8, bfloat16") == precision_table(report).count("int4, bfloat16") == 2


def test_tables_say_how_to_measure_what_is_missing() -> None:
    assert "bench_precision" in precision_table(None)
    assert "bench_quantized" in quantized_table(None)
    assert "bench_real_size" in real_size_table(None)
    assert "bench_generate" in generate_tables(None, "generate")
