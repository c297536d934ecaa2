"""The measurement of slices runs, in little, on the embedded model."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_slices


def test_every_slice_gets_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "slices.json"
    monkeypatch.setattr("sys.argv", ["bench_slices", "--quick", "--models", "embedded", "--out", str(report)])
    bench_slices.main()
    rows = json.loads(report.read_text())["models"]["embedded"]
    assert [row["slice_seconds"] for row in rows] == [0.0, 0.03, 0.1, 0.3, 1.0, None]
    for row in rows:
        assert 0 < row["median_gap_seconds"] <= row["longest_gap_seconds"]
        assert row["time_to_first_token_seconds"] > 0
        assert row["tokens_per_second"] > 0
