"""What benchmarks say of policies: the best of what was tried, and that the recommended ones are not slow."""

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks.policy_tables import MOST_OF_PREFILL, RECOMMENDED, later_layers, speed_by_policy
from benchmarks.tune_policies import CANDIDATES, tuned
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.report import make_report

SPEED = Path(__file__).parents[2] / "benchmarks/results/policies/speed.json"


@pytest.mark.skipif(not SPEED.exists(), reason="bench_policies has not been run")
def test_recommended_policies_take_little_of_a_prefill_also_where_the_rest_is_merged() -> None:
    rows = json.loads(SPEED.read_text())["policies"]
    shares = {(row["policy"], row["merge_ratio"] > 0): row["share_with_encoding"] for row in rows}
    for policy, is_merged in product(RECOMMENDED, (False, True)):
        assert shares[policy, is_merged] < MOST_OF_PREFILL


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
    about = {"machine": {"cpu": "ours", "num_threads": 1}, "versions": {"torch": "2"}, "scratch_bytes": 2**20}
    lines = speed_by_policy({"policies": rows, **about}).splitlines()
    assert lines[2:4] == [
        "| `cls` | 250.0 | 2 | 125.0 | 50.0% | 4.0% |  |",
        "| `cls`, merged | 250.0 | 2 | 125.0 | 50.0% | 6.0% | slow |",
    ]


def test_layers_that_hold_less_are_told_with_their_rows_and_their_pages_of_either_kind() -> None:
    rows = [
        {
            "policy": policy,
            "parameters": parameters,
            "accuracy": 0.875,
            "layer_rows": [260.0, 130.4, 0.0],
            "held_bytes": {"shared_pages": 3072.0, "pages_of_one_layer": 2048.0},
        }
        for policy, parameters in (("untrimmed", {}), ("todre", {"late_exit_threshold": 0.5}))
    ]
    lines = later_layers({"rows": rows, "questions": 1200, "keep": 0.5}).splitlines()
    assert lines[2:4] == [
        "| untrimmed | 87.5% | 260, 130, 0 | 3 | 2 |",
        "| `todre:late_exit_threshold=0.5` | 87.5% | 260, 130, 0 | 3 | 2 |",
    ]
    assert lines[-1].startswith("1,200 questions; means over them. `sparsevlm` keeps 50%")


def test_the_best_mean_over_budgets_is_found_and_defaults_win_ties(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    powers, rights = (None, 0.25, 4.0), ((1, 1), (1, 1), (1, 0))  # of the two budgets
    image_rights = {"vispruner": ((0, 1), (1, 1), (0, 0)), "cdpruner": rights}
    trims, row = [], [Answer("yes", 10, 10, 0.0)]
    for policy in CANDIDATES:
        parameter = list(CANDIDATES[policy])[-1]
        for value, right in zip(powers, image_rights[policy], strict=True):
            for share, is_right in zip((0.2, 0.5), right, strict=True):
                parameters = {} if value is None else {parameter: value}
                trims.append(TrimRequest(policy=policy, parameters=parameters, budget=FixedRatio(share)))
                row.append(Answer("yes" if is_right else "no", 10, 5, 0.1))
    questions = [Question(tmp_path / "a.png", "Is it?", "yes")]
    found = tuned(make_report(questions, [row], trims, run={}, model={}, data={}))
    assert found == [
        {"policy": "vispruner", "parameters": {"important_ratio": 0.25}, "accuracy": 1.0, "by_default": 0.5},
        {"policy": "cdpruner", "parameters": {}, "accuracy": 1.0, "by_default": 1.0},
    ]
