"""What benchmarks say of policies: that the recommended ones are not slow, and what the tables tell."""

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks import bench_learned, bench_policies
from benchmarks.bench_policies import MOST_OF_PREFILL, RECOMMENDED
from benchmarks.machine import about

SPEED = Path(__file__).parents[2] / "benchmarks/results/policies/speed.json"


@pytest.mark.skipif(not SPEED.exists(), reason="bench_policies has not been run")
def test_recommended_policies_take_little_of_a_prefill_also_where_the_rest_is_merged() -> None:
    rows = json.loads(SPEED.read_text())["policies"]
    shares = {(row["policy"], row["merge_ratio"] > 0): row["share_with_encoding"] for row in rows}
    for policy, is_merged in product(RECOMMENDED, (False, True)):
        assert shares[policy, is_merged] < MOST_OF_PREFILL


def test_trained_rows_are_told_with_their_size_and_what_only_chooses_without() -> None:
    def row(policy: str, rows: int, merge_ratio: float) -> dict[str, object]:
        figures = {
            "held": 0.125,
            "accuracy": 0.9,
            "change": -0.05,
            "change_interval": [-0.06, -0.04],
            "divergence": 0.5,
        }
        return {"policy": policy, "name": policy, "rows": rows, "merge_ratio": merge_ratio, **figures}

    trained = [
        {"method": method, "rows": rows, "weights": 1234, "loss_before": 0.5, "loss_after": 0.25}
        for method, rows in (("quecc", 7), ("exit", 0))
    ]
    rows = [row("untrimmed", 0, 0.0), row("quecc", 7, 0.0), row("cls", 0, 0.09), row("exit", 0, 0.0)]
    guide = {"weights": 4321, "steps": 1000, "accuracy": 0.5}
    report = {"questions": 2000, "trained": trained, "guide": guide, "rows": {"11": rows}}
    lines = bench_learned.table(report).splitlines()
    assert lines[0] == "About 11 % of the rows; 2,000 questions, untrimmed 90.0%:"
    assert lines[4:6] == [
        "| `quecc` | 12.5% | 90.0% | -5.0 [-6.0, -4.0] | 0.500 | 1,234 | 0.500 → 0.250 |",
        "| `cls`, merged | 12.5% | 90.0% | -5.0 [-6.0, -4.0] | 0.500 |  |  |",
    ]
    assert lines[-3].endswith("90.0%, KL 0.500; 1,234 weights, loss 0.500 → 0.250.")
    assert lines[-1] == "The guide of `guided`: 4,321 weights, 1,000 steps of training; by itself it answers 50.0%."


def test_the_table_calls_slow_what_takes_more_even_where_the_image_is_encoded() -> None:
    rows = [
        {
            "policy": "cls",
            "merge_ratio": merge_ratio,
            "seconds": 0.25,
            "peak_extra_bytes": 2**21,
            "bench_seconds": 0.125,
            "share_of_prefill": 0.5,
            "share_with_encoding": share,
        }
        for merge_ratio, share in ((0.0, 0.04), (0.1, 0.06))
    ]
    lines = bench_policies.table({"policies": rows, "scratch_bytes": 2**20, **about(1)}).splitlines()
    assert lines[2:4] == [
        "| `cls` | 250.0 | 2 | 125.0 | 50.0% | 4.0% |",
        "| `cls`, merged | 250.0 | 2 | 125.0 | 50.0% | 6.0%, slow |",
    ]
