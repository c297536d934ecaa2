"""Replaces an argument of a command by options that it is made of."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Command", "with_options"]

Command = Callable[..., None]


def with_options(
    command: Command, argument: str, options: Iterable[inspect.Parameter], make: Callable[[Mapping[str, Any]], object]
) -> Command:
    """The command with options in place of one of its arguments.

    Args:
        command: a function that typer makes a command of, or that this function returned.
        argument: its name; the command has it as a keyword.
        options: keyword-only parameters; those whose name the command itself has are left out.
        make: what the command gets as the argument, from the values of the options by name.
    """
    own = [each for each in inspect.signature(command).parameters.values() if each.name != argument]
    taken = {each.name for each in own}
    added = [option for option in options if option.name not in taken]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        made = make({option.name: arguments.pop(option.name) for option in added})
        command(**arguments, **{argument: made})

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]  # functions may carry one
    run.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
    return run
