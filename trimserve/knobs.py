"""The knobs of `config.py` as command options and environment variables, and the option that may add to them."""

import difflib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize, ValidationError

from trimserve.config import Config, EngineConfig, ModelConfig, ServerConfig
from trimserve.options import Command, with_options
from trimserve.validation import complaint

__all__ = ["adapter_of", "is_knob", "with_knobs"]

_SECTIONS: dict[str, type[BaseModel]] = {"model": ModelConfig, "engine": EngineConfig, "server": ServerConfig}
_PREFIX = "TRIMSERVE__"
_PANEL = "Knobs: "


def with_knobs(*sections: str, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add the knobs of config sections to a command as options; it receives them, validated, as its argument `config`.

    A knob with the name of one of the command's own options is left out. An environment variable that looks like a
    knob's but names none, of any section, is refused, because it would have no effect.

    Args:
        sections: of the config.
        without: knobs that would have no effect on the command.
    """
    knobs = [knob for section in sections for knob in _knobs(section) if knob.name not in without]

    def config(values: Mapping[str, Any]) -> Config:
        """The config, of an environment without unknown variables."""
        _refuse_unknown_variables()
        return _config(values)

    def decorate(command: Command) -> Command:
        return with_options(command, "config", knobs, config)

    return decorate


def adapter_of(adapter: str | None, config: Config, *, is_served: bool) -> tuple[str | None, Config]:
    """The name of an adapter, and the config of a model of one's own that has it loaded.

    Args:
        adapter: as the option says it.
        config: without the adapter.
        is_served: whether a running server is asked.
    """
    if adapter is None:
        return None, config
    name, equals, _ = adapter.partition("=")
    if bool(equals) == is_served:
        raise typer.BadParameter("must be NAME=FOLDER without --address, and NAME with it", param_hint="--adapter")
    if not equals:
        return name, config
    try:
        model = ModelConfig(**{**dict(config.model), "adapter": (adapter,)})
    except ValidationError as error:
        raise typer.BadParameter(complaint(error.errors()[0]), param_hint="--adapter") from None
    return name, config.model_copy(update={"model": model})


def is_knob(option: Any) -> bool:
    """Whether an option of a command, as typer has it, came from `with_knobs`."""
    return (getattr(option, "rich_help_panel", None) or "").startswith(_PANEL)


def _refuse_unknown_variables() -> None:
    known = {_variable(section, name) for section, model in _SECTIONS.items() for name in model.model_fields}
    for variable in sorted(os.environ):
        if variable.upper().startswith(_PREFIX) and variable not in known:
            alike = difflib.get_close_matches(variable.upper(), known, n=1)
            guess = f"; did you mean {alike[0]}?" if alike else ""
            raise typer.BadParameter(f"the environment has {variable}, which is no knob{guess}")


def _variable(section: str, knob: str) -> str:
    """`TRIMSERVE__ENGINE__MAX_BATCH` is the variable of the engine's `max_batch`."""
    return f"{_PREFIX}{section.upper()}__{knob.upper()}"


def _knobs(section: str) -> Iterator[inspect.Parameter]:
    """The fields of a config section as options."""
    for name, field in _SECTIONS[section].model_fields.items():
        option = typer.Option(
            help=field.description,
            envvar=_variable(section, name),
            show_envvar=False,  # the panel tells the rule; whole names do not fit into 80 columns
            rich_help_panel=f"{_PANEL}{section}; in the environment {_variable(section, '')}...",
        )
        annotation: Any = Annotated[_plain(field.annotation), option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """A field's type without its bounds, which pydantic checks: `Annotated[int, ...] | None` becomes `int | None`.

    A size becomes text, because pydantic parses `2GiB`; a tuple becomes a list, for an option that is given again.
    """
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) is tuple:
        return list[_plain(get_args(annotation)[0])]  # type: ignore[misc]  # made at run time
    if get_origin(annotation) in (Union, UnionType):
        return reduce(or_, map(_plain, get_args(annotation)))
    return str if annotation is ByteSize else annotation


def _config(knobs: Mapping[str, Any]) -> Config:
    sections = {
        section: {name: knobs[name] for name in model.model_fields if name in knobs}
        for section, model in _SECTIONS.items()
    }
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        _, knob, *_ = first["loc"]  # behind the section; of a knob that is given again, its index follows
        option = "--" + str(knob).replace("_", "-")
        raise typer.BadParameter(complaint(first), param_hint=option) from None
