"""Parameters of a policy under which a model goes on as if nothing was trimmed, found without knowing what is right.

Source: the calibration of VFlowOpt, arXiv 2508.05211, which looks for the largest cosine between the last layer's
states of the last token with and without trimming. Adapted: logits, a linear map of those states, are compared, less
their mean, which softmax ignores; and the search goes along one parameter at a time over fixed candidates instead of by
a Bayesian model: all candidates of a pass share each image's encoding, and the result is the same every time. The
divergence of the distributions is another measure that needs no answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trimserve.api.info import ParameterInfo
from trimserve.api.trim import TrimRequest
from trimserve.evaluation.answers import Answerer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.settings import under
from trimserve.trimming.policies.table import POLICIES

__all__ = ["Found", "Measure", "Tried", "candidates", "find_parameters", "max_passes"]

Measure = Literal["cosine", "kl"]
"""Which parameters are best: those with the largest `Tried.similarity`, or with the smallest `Tried.divergence`."""

_ROUNDS = 3
_SHARES = 9  # candidates between two ends that are close to each other
_CLOSE = 2


@dataclass(frozen=True, slots=True)
class Tried:
    """One set of parameters that was tried."""

    parameters: dict[str, float]
    similarity: float
    """Mean over questions and budgets of the cosine between the logits after the prompt and the untrimmed ones."""
    divergence: float
    """The same of KL(untrimmed || trimmed) of the first generated token's distribution, in nats."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best parameters."""

    parameters: dict[str, float]
    probes: tuple[Tried, ...]
    """What was tried, in that order."""


def max_passes(policy: str) -> int:
    """Passes over the questions that `find_parameters` needs at most."""
    return _ROUNDS * len(POLICIES[policy].describe().parameters)


def candidates(parameter: ParameterInfo) -> list[float]:
    """What is tried of a parameter: its default, and values from end to end of its range.

    Evenly spaced ones where the ends are at most 2 apart; otherwise the lower end, and 1, 2 and 5 times the powers of
    ten, from 0.1 upwards, or from 1 where it is a whole number.
    """
    is_whole = isinstance(parameter.default, int)
    if parameter.high - parameter.low <= _CLOSE and not is_whole:
        values = np.linspace(parameter.low, parameter.high, _SHARES).tolist()
    else:
        powers = range(0 if is_whole else -1, len(str(int(parameter.high))))
        values = [parameter.low, *(digit * 10.0**power for power in powers for digit in (1, 2, 5))]
    values = [value for value in values if parameter.low <= value <= parameter.high]
    values = values[1:] if parameter.is_low_open else values
    return list(dict.fromkeys(type(parameter.default)(round(value, 9)) for value in (parameter.default, *values)))


def find_parameters(
    answerer: Answerer,
    questions: Sequence[Question],
    trim: TrimRequest,
    budgets: Sequence[float],
    measure: Measure = "cosine",
    *,
    on_question: Callable[[], None] = lambda: None,
) -> Found:
    """Find the parameters under which the first token is drawn most like untrimmed, over all questions and budgets.

    Goes along the parameters in turn, trying all `candidates` of one while the others stay, until a round changes
    nothing, for three rounds at most. Of equal ones the first that was tried wins, beginning with the defaults.

    Args:
        answerer: who answers, in this process; one token of each answer is enough.
        questions: at least one; their answers are not looked at.
        trim: a policy with parameters, and merge_ratio; parameters that it sets are where the search begins.
        budgets: shares of the image that stay, each in (0, 1); not looked at where the policy takes none.
        measure: what best means.
        on_question: called after each question of each pass.
    Raises:
        DatasetError: the model refuses a question's image or text.
    """

    def gain(probe: Tried) -> float:
        """What is to be large."""
        return probe.similarity if measure == "cosine" else -probe.divergence

    known = POLICIES[trim.policy].describe().parameters
    best = {each.name: trim.parameters.get(each.name, each.default) for each in known}
    tried: dict[tuple[float, ...], Tried] = {}
    for _ in range(_ROUNDS):
        before = best
        for parameter in known:
            asked = [best, *(best | {parameter.name: value} for value in candidates(parameter))]
            new = {tuple(each.values()): each for each in asked if tuple(each.values()) not in tried}
            probes = _try(answerer, questions, trim, list(new.values()), budgets, on_question) if new else ()
            tried.update(zip(new, probes, strict=True))
            best = max((tried[tuple(each.values())] for each in asked), key=gain).parameters
        if best == before:
            break
    return Found(best, tuple(tried.values()))


def _try(
    answerer: Answerer,
    questions: Sequence[Question],
    trim: TrimRequest,
    asked: Sequence[dict[str, float]],
    budgets: Sequence[float],
    on_question: Callable[[], None],
) -> Iterator[Tried]:
    settings = [under(replace(trim, parameters=parameters), budgets, is_kept=True) for parameters in asked]
    trims = [each for of_parameters in settings for each in of_parameters]
    figures = []
    for _, *trimmed in answerer.answers(questions, trims, max_new_tokens=1):
        figures.append([(answer.similarity, answer.divergence) for answer in trimmed])
        on_question()
    means = np.array(figures, dtype=np.float64).reshape(len(questions), len(asked), -1, 2).mean(axis=(0, 2))
    for parameters, (similarity, divergence) in zip(asked, means.round(9).tolist(), strict=True):
        yield Tried(parameters, similarity, divergence)
