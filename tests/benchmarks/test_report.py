"""From exchanges to report and tables."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_bytes, bench_serve
from benchmarks.load import summary
from benchmarks.machine import about
from benchmarks.report import command_line, finish, tabulated
from scripts.generate.docs import measured
from scripts.generate.verified_tables import load_table, walkthrough_table
from tests.benchmarks.conftest import Maker

PLAN = asdict(bench_serve.Plan(2, concurrency=2, max_new_tokens=3))


@pytest.fixture
def report(make: Maker) -> dict[str, Any]:
    """Of one model; `transformers serve` refused it."""
    loads: dict[str, Any] = {
        "trimserve": summary([make.exchange(0.0, 0.5, 0.6, 0.8), make.exchange(0.0, 0.6, 0.7, 1.0)]),
        "transformers_sequential": summary([make.exchange(0.0, 1.0, 1.5, 2.0), make.exchange(0.0, 2.0, 3.0, 4.0)]),
        "transformers_serve": {"errors": ["Traceback\nValueError: Mllama is not served"]},
    }
    image = {"num_images": 1, "first_seconds": 0.5, "repeated_seconds": 0.1, "repeated_over_first": 0.2}
    latency = {"rounds": 1, "tokens_per_round": 3, "service_seconds_per_token": 0.011, "bare_step_seconds": 0.01}
    model = {
        "model": "embedded",
        "max_kept_fraction": None,
        "loads": loads,
        "repeated_images": {"four_tiles": image, "one_tile": image},
        "num_untrimmed_answers_as_transformers": 1,
        "added_latency": {**latency, "added_seconds_per_token": 0.001, "added_over_bare_step": 0.1},
    }
    return {**about(1), "models": [{**model, "plan": PLAN}]}


def test_a_report_says_where_it_comes_from_and_is_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_serve.py", "--threads", "3", "--out", str(tmp_path / "new")])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    report = finish(command_line("", "serve", threads=1), {"models": []}, "report.json")
    assert {"machine", "versions", "commit", "seconds", "models"} <= report.keys()
    assert (report["benchmark"], report["machine"]["num_threads"]) == ("serve", 3)
    written = (tmp_path / "new" / "report.json").read_text()
    assert json.loads(written) == json.loads(capsys.readouterr().out.splitlines()[-1]) == report


def test_options_are_what_their_defaults_are(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "runs": 3,
        "quick": False,
        "names": ["a", "b"],
        "bench_model": Path("x"),
    }
    monkeypatch.setattr("sys.argv", ["bench", "--runs", "5", "--bench-model", "y"])
    found = command_line("", "file.json", **options, rival=None)
    assert (found.runs, found.bench_model, found.threads) == (5, Path("y"), 1)
    assert (found.quick, found.names, found.rival) == (False, ["a", "b"], None)
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--names", "b", "--rival", "z"])
    found = command_line("", "file.json", **options, rival=None)
    assert (found.quick, found.names, found.rival) == (True, ["b"], "z")


def test_columns_tell_rows_by_formats_and_functions() -> None:
    rows = [{"name": "one", "ms": {"median": 1.25}}, {"name": "two", "ms": {"median": 1000.0}}]
    table = tabulated(rows, {"what": "{name}", "ms": "{ms[median]:,.1f}", "length": lambda row: len(row["name"])})
    assert table.splitlines() == [
        "| what | ms | length |",
        "|---|---:|---:|",
        "| one | 1.2 | 3 |",
        "| two | 1,000.0 | 3 |",
    ]


def test_serve_table_has_a_row_for_each_target(report: dict[str, Any]) -> None:
    table = bench_serve.table(report)
    assert "| trimserve | 6.0 | 550.0 | 599.0 |" in table
    assert "| `transformers serve` | failed: ValueError: Mllama is not served |" in table
    assert "4.0 times that of transformers, one at a time" in table
    assert "adds 1.00 ms to a token at batch 1, 10% of the bare decode step of 10.00 ms" in table


def test_a_rival_that_did_not_answer_every_request_is_not_compared(report: dict[str, Any]) -> None:
    loads = report["models"][0]["loads"]
    assert "times that of transformers, one at a time" in bench_serve.table(report)
    loads["transformers_sequential"]["errors"] = ["one of two failed"]
    assert "No rival answered every request" in bench_serve.table(report)


def test_bytes_tables_name_every_layout() -> None:
    sizes = {"self": 2**20, "cross": 2**20, "total": 2**21}
    layouts = ("trimserve", "trimserve_untrimmed", "transformers")
    counts = {name: index for index, name in enumerate(layouts)}
    request = {
        "features": {"padding": 0, "valid": 100, "kept": 40, "merged": 10},
        "bytes": {name: {**sizes, "total": (1 + index) * 2**20} for index, name in enumerate(layouts)},
        "cross_bytes_over_transformers": 0.5,
    }
    model = {
        "model": "bench",
        "dtype": "float32",
        "k_ratio": 0.2,
        "max_kept_fraction": 0.5,
        "max_new_tokens": 128,
        "requests": {"four_tiles": request, "one_tile": request},
        "at_once": {"kv_bytes": 2**28, **dict.fromkeys(("four_tiles", "one_tile"), counts)},
    }
    table = bench_bytes.table({**about(1), "models": [model]})
    assert "| 4 tiles | 100 | 50 | 1.0 MiB (0) | 2.0 MiB (1) | 3.0 MiB (2) | 0.500 |" in table
    assert "at once in 256.0 MiB of KV" in table


def test_what_was_not_measured_is_said_to_be_so() -> None:
    told = measured(bench_serve.table, "python -m benchmarks.bench_serve", "no such file.json")
    assert told == "Not measured yet: `python -m benchmarks.bench_serve`."


def test_the_load_tells_who_waited_and_what_did_not_hold() -> None:
    report = {
        **about(1),
        "seconds": 60.4,
        "plan": {"clients": 200},
        "requests": {"answered": 1234, "not_as_provoked": 1},
        "tokens_per_second": 99.6,
        "memory": {"growth": 0.012},
        "onlookers_seconds": {"health": {"p50": 0.001, "p99": 0.25, "max": 1.5, "num": 1000}},
        "checks": {"pool_is_empty": True, "onlookers_are_answered": False},
    }
    table = load_table(report)
    assert "| health | 1,000 | 1 | 250 | 1,500 |" in table
    assert "1,234 streams came whole and 1 did not; 100 tokens/s" in table
    assert "Not held: onlookers are answered." in table
    assert "All checks held." in load_table({**report, "checks": {"pool_is_empty": True}})


def test_the_walkthrough_tells_each_command_with_its_seconds() -> None:
    steps = [{"command": "make build", "seconds": 123.44}, {"command": "curl | grep", "seconds": 0.04}]
    table = walkthrough_table({"steps": steps})
    assert table.splitlines()[2:] == ["| `make build` | 123.4 |", r"| `curl \| grep` | 0.0 |"]
