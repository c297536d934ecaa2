"""The measurement of repeated images runs, in little."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_repeated
from trimserve.model.checkpoint import embedded_model_folder


def test_kept_keys_and_values_are_compared_with_projecting_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "repeated.json"
    options = ["--pairs", "2", "--bench-model", str(embedded_model_folder()), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench_repeated", *options])
    bench_repeated.main()
    report = json.loads(out.read_text())
    assert [row["case"] for row in report["rows"]] == ["trimmed", "untrimmed"]
    for row in report["rows"]:
        assert 0 < row["of_features"]["interval"][0] <= row["of_features"]["interval"][1]
