"""benchmarks.bench_default: what is held, and which way is chosen."""

from benchmarks.bench_default import Candidate, best
from trimserve.api.trim import FixedRatio


def test_the_default_is_what_loses_least_on_its_worst_kind() -> None:
    tried = [
        {"name": "uneven", "changes": {"busy": {"value": 0.0}, "page": {"value": -0.2}}},
        {"name": "even", "changes": {"busy": {"value": -0.05}, "page": {"value": -0.05}}},
    ]
    assert best(tried) == "even"


def test_merged_rows_count_in_what_a_candidate_holds() -> None:
    budget = Candidate("trimmed", 0.1).holding(0.28).budget
    assert budget == FixedRatio(0.2)
