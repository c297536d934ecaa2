"""The two ways to use an answerer: the curve over policies and k_ratios, and the smallest k_ratio within a bound."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimserve.api.trim import TrimRequest
from trimserve.evaluation.answers import Answer, Answerer
from trimserve.evaluation.dataset import Question, describe_questions
from trimserve.evaluation.report import Report, about_this_run, make_report
from trimserve.trimming.plan import TrimPlan

__all__ = ["MAX_PROBES", "Calibration", "Probe", "calibrate", "measure_curve"]

MAX_PROBES = 7
"""Passes over the questions that `calibrate` needs at most."""

_STEPS = 100  # calibrate tells k_ratio to two decimals


@dataclass(frozen=True, slots=True)
class Probe:
    """One k_ratio that calibration tried."""

    k_ratio: float
    kept_fraction: float
    """Mean over the questions of rows held, kept features and merged ones, by valid features."""
    divergence: float
    """Mean KL(untrimmed || trimmed) of the first generated token's distribution, in nats."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The smallest k_ratio within a bound."""

    k_ratio: float
    max_divergence: float
    """The bound, in nats."""
    probes: tuple[Probe, ...]
    """What was tried, in that order."""


def measure_curve(
    answerer: Answerer,
    questions: Sequence[Question],
    trims: Sequence[TrimRequest],
    *,
    on_question: Callable[[], None] = lambda: None,
) -> Report:
    """Answer every question untrimmed and under every setting, and report.

    A setting that can drop nothing is the untrimmed path, bit for bit, and takes over its answers.

    Args:
        answerer: who answers.
        questions: with what is right, at least one.
        trims: policies and budgets, at least one.
        on_question: called after each question.
    Raises:
        DatasetError: the model refuses a question's image or text.
    """
    asked = [trim for trim in trims if TrimPlan.of(trim).policy is not None]
    columns = [asked.index(trim) + 1 if trim in asked else 0 for trim in trims]
    answers: list[list[Answer]] = []
    started_at = time.monotonic()
    for row in answerer.answers(questions, asked):
        answers.append([row[0], *(row[column] for column in columns)])
        on_question()
    seconds = time.monotonic() - started_at
    run = about_this_run(seconds, len(questions) * (1 + len(asked)))
    return make_report(
        questions, answers, trims, run=run, model=answerer.describe(), data=describe_questions(questions)
    )


def calibrate(
    answerer: Answerer,
    questions: Sequence[Question],
    max_divergence: float,
    trim: TrimRequest,
    *,
    on_question: Callable[[], None] = lambda: None,
) -> Calibration:
    """Find the smallest k_ratio whose answers begin like the untrimmed ones, without knowing what is right.

    Bisects over the multiples of 0.01, so it takes for granted that the divergence falls as k_ratio rises. That
    holds for the mean over many questions but for noise; with few questions the result is as noisy as they are.

    Args:
        answerer: who answers; one token of each answer is enough.
        questions: at least one; their answers are not looked at.
        max_divergence: bound on the mean KL(untrimmed || trimmed) of the first token, in nats, at least 0.
        trim: policy and merge_ratio.
        on_question: called after each question of each probe.
    Raises:
        DatasetError: the model refuses a question's image or text.
    """
    probes: list[Probe] = []
    fails, passes = 0, _STEPS  # k_ratio 1 is the untrimmed path
    while passes - fails > 1:
        middle = (fails + passes) // 2
        probe = _probe(answerer, questions, replace(trim, k_ratio=middle / _STEPS), on_question)
        probes.append(probe)
        if probe.divergence <= max_divergence:
            passes = middle
        else:
            fails = middle
    return Calibration(passes / _STEPS, max_divergence, tuple(probes))


def _probe(
    answerer: Answerer, questions: Sequence[Question], trim: TrimRequest, on_question: Callable[[], None]
) -> Probe:
    held, divergences = [], []
    for _, trimmed in answerer.answers(questions, [trim], max_new_tokens=1):
        held.append(trimmed.num_held / trimmed.num_valid)
        divergences.append(trimmed.divergence)
        on_question()
    return Probe(trim.k_ratio, float(np.mean(held)), float(np.mean(divergences)))
