"""The measurement of pages that grow runs, in little."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_growth


def test_every_run_gets_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "growth.json"
    monkeypatch.setattr("sys.argv", ["bench_growth", "--quick", "--out", str(out)])
    bench_growth.main()
    report = json.loads(out.read_text())
    assert set(report["runs"]) == {"reserved", "grown", "exact", "ample", "short"}
    assert report["at_once_ratio"] >= 4
    assert report["runs"]["short"]["num_preemptions"] > 0
    assert report["choices"]["cross_kv_ratio"] == 1
