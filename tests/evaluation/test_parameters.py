"""The search for parameters, over an answerer that is known in closed form."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from trimserve.api.info import ParameterInfo
from trimserve.api.trim import TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.parameters import candidates, find_parameters, max_passes

VFLOWOPT = TrimRequest(policy="vflowopt")
QUESTIONS = [Question(Path("a.png"), str(number)) for number in range(3)]


class Ridge:
    """The cosine is largest where the threshold is 2 and the weight 0.5, the divergence least where 5 and 1."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.asked: list[list[dict[str, float]]] = []

    @property
    def policies(self) -> Sequence[str]:
        return ("vflowopt",)

    def describe(self) -> dict[str, Any]:
        return {}

    def answers(
        self, questions: Iterable[Question], trims: Sequence[TrimRequest], *, max_new_tokens: int | None = None
    ) -> Iterator[list[Answer]]:
        assert max_new_tokens == 1
        self.asked.append([dict(trim.parameters) for trim in trims])
        for question in questions:
            row = [Answer("", 10, 10, 0.0, 1.0)]
            for trim in trims:
                threshold, weight = (trim.parameters[name] for name in ("global_threshold", "entropy_weight"))
                similarity = 1 - (abs(threshold - 2) + abs(weight - 0.5)) / 10_000 - int(question.text) / 1000
                row.append(Answer("", 10, 2, abs(threshold - 5) + abs(weight - 1), similarity))
            yield row


def test_the_parameters_that_are_most_alike_are_found_one_after_the_other() -> None:
    ridge, ticks = Ridge(), list[None]()
    found = find_parameters(ridge, QUESTIONS, VFLOWOPT, [0.2, 0.5], on_question=lambda: ticks.append(None))
    assert found.parameters == {"global_threshold": 2, "entropy_weight": 0.5}
    best = max(found.probes, key=lambda probe: probe.similarity)
    assert best.parameters == found.parameters
    assert best.similarity == pytest.approx(1 - 0.001)  # mean of what the questions take off
    assert found.probes[0].parameters == {"global_threshold": 30, "entropy_weight": 0}
    assert len(ticks) <= max_passes("vflowopt") * len(QUESTIONS)


def test_the_divergence_can_be_gone_by_as_well() -> None:
    found = find_parameters(Ridge(), QUESTIONS, VFLOWOPT, [0.2], "kl")
    assert found.parameters == {"global_threshold": 5, "entropy_weight": 1}


def test_nothing_is_tried_twice() -> None:
    ridge = Ridge()
    found = find_parameters(ridge, QUESTIONS, VFLOWOPT, [0.2])
    asked = [tuple(each.values()) for batch in ridge.asked for each in batch]
    assert len(asked) == len(set(asked)) == len(found.probes)


def test_the_search_begins_where_it_is_told_to() -> None:
    trim = TrimRequest(policy="vflowopt", parameters={"entropy_weight": 3.5})
    found = find_parameters(Ridge(), QUESTIONS, trim, [0.2])
    assert found.probes[0].parameters == {"global_threshold": 30, "entropy_weight": 3.5}


CASES: list[tuple[float, float, float, bool, list[float]]] = [  # default, low, high, is_low_open, candidates
    (0.5, 0, 1, False, [0.5, 0, 0.125, 0.25, 0.375, 0.625, 0.75, 0.875, 1]),
    (0.3, 0, 10, True, [0.3, 0.1, 0.2, 0.5, 1, 2, 5, 10]),
    (5, 1, 24, False, [5, 1, 2, 10, 20]),
]


@pytest.mark.parametrize(("default", "low", "high", "is_low_open", "values"), CASES)
def test_candidates_go_from_end_to_end(
    default: float, low: float, high: float, is_low_open: bool, values: list[float]
) -> None:
    found = candidates(ParameterInfo("name", default, "What it is.", low, high, is_low_open))
    assert found == values
    assert {type(value) for value in found} == {type(default)}
