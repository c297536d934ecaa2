"""The ways of trimming that `trimserve eval` is asked for, from the text of its options."""

import math
from collections.abc import Sequence
from dataclasses import replace

import typer

from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.evaluation.options import ALL_POLICIES
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.table import POLICIES

__all__ = ["has_parameters", "parse_policies", "parse_ratios", "under"]


def parse_ratios(text: str, option: str, *, can_be_zero: bool = False) -> list[float]:
    """Numbers in (0, 1], separated by commas, each once.

    Args:
        text: of the option.
        option: its name, for errors.
        can_be_zero: whether 0 is in range.
    Raises:
        typer.BadParameter: anything else.
    """
    bounds = "[0, 1]" if can_be_zero else "(0, 1]"
    ratios: list[float] = []
    for part in text.split(","):
        ratio = _number(part)
        if not (0 < ratio <= 1 or (can_be_zero and ratio == 0)):
            raise typer.BadParameter(f"must be numbers in {bounds}, got {part.strip()!r}", param_hint=option)
        ratios.append(ratio)
    return list(dict.fromkeys(ratios))


def parse_policies(text: str, known: Sequence[str], *, is_kept: bool) -> list[TrimRequest]:
    """Policies with their parameters, separated by commas, each once.

    Args:
        text: such as `trimmed,vispruner:layer=3:important_ratio=0.25`; `all` stands for `random` and every other one.
        known: policies that the model takes.
        is_kept: whether budgets are shares of the image, as a policy before the decoder needs them.
    Raises:
        typer.BadParameter: an unknown policy or parameter, or a value out of its range.
    """
    asked: list[str] = []
    for part in text.split(","):
        asked += ["random", *known] if part.strip() == ALL_POLICIES else [part.strip()]
    return [_policy(each, known, is_kept=is_kept) for each in dict.fromkeys(asked)]


def has_parameters(trim: TrimRequest) -> bool:
    """Whether its policy has any."""
    return bool(POLICIES[trim.policy].describe().parameters)


def under(trim: TrimRequest, budgets: Sequence[float], *, is_kept: bool) -> list[TrimRequest]:
    """A policy under each of the budgets.

    Args:
        trim: names the policy; one that takes no budget is alone.
        budgets: in (0, 1].
        is_kept: whether they are shares of the image, or of each head's picks.
    """
    if not is_kept:
        return [replace(trim, k_ratio=ratio) for ratio in budgets]
    if not POLICIES[trim.policy].budgets:
        return [trim]
    return [replace(trim, budget=FixedRatio(ratio)) for ratio in budgets]


def _policy(text: str, known: Sequence[str], *, is_kept: bool) -> TrimRequest:
    name, *settings = text.split(":")
    if name not in known:
        raise typer.BadParameter(f"must be among {', '.join(known)}, got {name!r}", param_hint="--policies")
    if issubclass(POLICIES[name], BeforeDecoder) and not is_kept:
        raise typer.BadParameter(f"{name} chooses before any head looks: use --keep", param_hint="--policies")
    return TrimRequest(policy=name, parameters=dict(_parameter(name, setting) for setting in settings))


def _parameter(policy: str, setting: str) -> tuple[str, float]:
    known = {each.name: each for each in POLICIES[policy].describe().parameters}
    name, _, text = setting.partition("=")
    if name not in known:
        names = ", ".join(known) or "none"
        raise typer.BadParameter(f"must be a parameter of {policy} ({names}), got {name!r}", param_hint="--policies")
    bounds, value = known[name], _number(text)
    is_whole = isinstance(bounds.default, int)
    if not bounds.low <= value <= bounds.high or (bounds.is_low_open and value == bounds.low) or value % 1 * is_whole:
        kind = "a whole number" if is_whole else "a number"
        open_end = "(" if bounds.is_low_open else "["
        message = f"{name} must be {kind} in {open_end}{bounds.low:g}, {bounds.high:g}], got {text!r}"
        raise typer.BadParameter(message, param_hint="--policies")
    return name, int(value) if is_whole else value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
