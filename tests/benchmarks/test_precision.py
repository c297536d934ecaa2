"""The measurement of precisions runs, in little; its table shows every precision."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_precision


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
    table = bench_precision.table(report)
    assert table.count("int8, bfloat16") == table.count("int4, bfloat16") == 2
