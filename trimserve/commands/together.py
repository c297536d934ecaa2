"""Options that have no effect beside others: what is typed is refused, not left out without a word.

Only what is typed counts: the environment holds for all commands, and a default was not asked for.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import typer
from typer.core import TyperCommand

from trimserve.knobs import is_knob

__all__ = ["CheckedCommand"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Of one command."""

    option: str
    needs: str = ""
    """Another option, without which it has no effect."""
    excludes: str = ""
    """Another option, beside which it has none."""


_MODEL_OF_EVAL: Final = (
    "--model",
    "--device",
    "--dtype",
    "--quantize",
    "--codebook",
    "--compressor",
    "--guide-model",
    "--num-threads",
)

_RULES: Mapping[str, Collection[_Rule]] = {
    "eval": (
        *(_Rule(option, excludes="--address") for option in _MODEL_OF_EVAL),
        _Rule("--k-ratios", excludes="--keep"),
        _Rule("--k-ratios", excludes="--calibrate"),
        _Rule("--max-kl", needs="--calibrate"),
        _Rule("--max-kl", excludes="--keep"),
        _Rule("--by", needs="--calibrate"),
        _Rule("--by", needs="--keep"),
    ),
    "explain": (_Rule("--policy", excludes="--policies"), _Rule("--k-ratio", excludes="--policies")),
}
"""Beside what holds for all commands: knobs are of a server of one's own, and a token is for another one."""


class CheckedCommand(TyperCommand):
    """A command that refuses such options."""

    def invoke(self, ctx: Any) -> Any:
        """Check what was typed, then run."""
        typed = [each for each in self.params if _is_typed(ctx, each.name)]
        options = [each.opts[0] for each in typed]
        rules = [*_RULES.get(self.name or "", ())]
        rules += [_Rule(each.opts[0], excludes="--address") for each in typed if is_knob(each)]
        if self.name != "status":  # which has an address by itself
            rules.append(_Rule("--token", needs="--address"))
        for rule in rules:
            if rule.option in options:
                _check(rule, options)
        return super().invoke(ctx)


def _is_typed(ctx: Any, name: str | None) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check(rule: _Rule, options: Collection[str]) -> None:
    if rule.needs and rule.needs not in options:
        raise typer.BadParameter(f"{rule.option} needs {rule.needs} beside it")
    if rule.excludes and rule.excludes in options:
        raise typer.BadParameter(f"{rule.excludes} excludes {rule.option}, which would have no effect")
