"""What exchanges come to: percentiles, rates, and how far two targets agree."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serve.load import Exchange
from benchmarks.serve.workload import KINDS

__all__ = ["agreement", "median_round", "percentiles", "ratios", "summary"]

_DIGITS = 5
"""Of seconds: 10 microseconds."""


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """p50, p90 and p99 with linear interpolation between samples; None without any."""
    values = list(samples)
    if not values:
        return None
    found = np.percentile(values, (50, 90, 99))
    return {name: round(float(value), _DIGITS) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}


def summary(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """Rates and latencies of a load.

    Rates count what was answered, from the first request's begin to the last answer's end. A time to first token
    includes all waiting.
    """
    answered = [each for each in exchanges if each.answer.error is None]
    seconds = max(each.finished for each in exchanges) - min(each.sent for each in exchanges)
    num_tokens = sum(each.answer.num_tokens for each in answered)
    valid = sum(each.answer.num_valid for each in answered)
    kept = sum(each.answer.num_kept + each.answer.num_merged for each in answered)
    return {
        "num_requests": len(exchanges),
        "errors": sorted({each.answer.error for each in exchanges if each.answer.error}),
        "num_failed": len(exchanges) - len(answered),
        "seconds": round(seconds, 3),
        "num_prompt_tokens": sum(each.answer.num_prompt_tokens for each in answered),
        "num_tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 2),
        "requests_per_second": round(len(answered) / seconds, 4),
        "time_to_first_token_seconds": percentiles(each.time_to_first_token for each in answered),
        "inter_token_seconds": percentiles(gap for each in answered for gap in each.gaps),
        "time_per_output_token_seconds": percentiles(each.time_per_output_token for each in answered),
        "duration_seconds": percentiles(each.duration for each in answered),
        "time_to_first_token_seconds_by_kind": _first_tokens(answered),
        "kept_fraction": round(kept / valid, 4) if valid else None,
    }


def median_round(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary that stands for several of the same load.

    Returns:
        The last one if that has errors, else the median by rate, of an even number the slower one in the middle; and
        the rates of all.
    """
    ordered = sorted(rounds, key=lambda each: each["tokens_per_second"])
    chosen = rounds[-1] if rounds[-1]["errors"] else ordered[(len(ordered) - 1) // 2]
    return {**chosen, "tokens_per_second_of_rounds": [each["tokens_per_second"] for each in ordered]}


def agreement(ours: Sequence[Exchange], theirs: Sequence[Exchange]) -> dict[str, Any]:
    """How many answers to the same items are the same to the last token.

    Args:
        ours: answers that tell token ids.
        theirs: the same, of another target.
    """
    pairs = [(a.answer, b.answer) for a, b in zip(ours, theirs, strict=True)]
    compared = [(a.token_ids, b.token_ids) for a, b in pairs if a.error is None and b.error is None]
    common = [_common_prefix(a, b) for a, b in compared]
    return {
        "num_compared": len(compared),
        "num_equal_prompts": sum(a.num_prompt_tokens == b.num_prompt_tokens for a, b in pairs),
        "num_equal_answers": sum(a == b for a, b in compared),
        "num_tokens": sum(len(a) for a, _ in compared),
        "num_tokens_before_they_part": sum(common),
    }


def ratios(loads: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of each of our closed loops over each rival's; rivals that failed a request are left out.

    Args:
        loads: summaries by target; ours begin with `trimserve`, the others' with `transformers`.
    """
    rates = {name: load["tokens_per_second"] for name, load in loads.items() if not load["errors"]}
    return {
        f"{ours}_over_{rival}": round(rates[ours] / rate, 3)
        for ours in ("trimserve", "trimserve_untrimmed")
        if ours in rates
        for rival, rate in rates.items()
        if rival.startswith("transformers")
    }


def _first_tokens(answered: Sequence[Exchange]) -> dict[str, dict[str, float] | None]:
    selections: dict[str, Callable[[Exchange], bool]] = {"first_image": lambda each: not each.item.is_repeated}
    selections["repeated_image"] = lambda each: each.item.is_repeated
    found: dict[str, dict[str, float] | None] = {}
    for kind in KINDS:
        of_kind = [each for each in answered if each.item.kind == kind]
        if kind == "text":
            found[kind] = percentiles(each.time_to_first_token for each in of_kind)
            continue
        for name, is_selected in selections.items():
            found[f"{kind}, {name}"] = percentiles(each.time_to_first_token for each in of_kind if is_selected(each))
    return found


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
