"""The knobs of `config.py` as options and environment variables of commands."""

import functools
import inspect
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize, ValidationError

from trimserve.config import Config, EngineConfig, ModelConfig, ServerConfig

__all__ = ["with_knobs"]

_SECTIONS: dict[str, type[BaseModel]] = {"model": ModelConfig, "engine": EngineConfig, "server": ServerConfig}


def with_knobs(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the knobs of config sections as options; it gets them checked, as its argument `config`.

    A knob that has the name of one of the command's own options is left out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [each for each in inspect.signature(command).parameters.values() if each.name != "config"]
        taken = {each.name for each in own}
        knobs = [each for section in sections for each in _knobs(section) if each.name not in taken]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            config = _config({knob.name: arguments.pop(knob.name) for knob in knobs})
            command(**arguments, config=config)

        run.__signature__ = inspect.Signature([*own, *knobs])  # type: ignore[attr-defined]  # functions may carry one
        run.__annotations__ = {each.name: each.annotation for each in (*own, *knobs)}
        return run

    return decorate


def _knobs(section: str) -> Iterator[inspect.Parameter]:
    """The fields of a config section as options; `TRIMSERVE__ENGINE__MAX_BATCH` is the variable of `max_batch`."""
    prefix = f"TRIMSERVE__{section.upper()}__"
    for name, field in _SECTIONS[section].model_fields.items():
        option = typer.Option(
            help=field.description,
            envvar=f"{prefix}{name.upper()}",
            show_envvar=False,  # the panel tells the rule; whole names do not fit into 80 columns
            rich_help_panel=f"Knobs: {section}; in the environment {prefix}...",
        )
        annotation: Any = Annotated[_plain(field.annotation), option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """A field's type without its bounds, which pydantic checks: `Annotated[int, ...] | None` is `int | None`.

    A size is text, because pydantic reads `2GiB`.
    """
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return reduce(or_, map(_plain, get_args(annotation)))
    return str if annotation is ByteSize else annotation


def _config(knobs: dict[str, Any]) -> Config:
    sections = {
        section: {name: knobs[name] for name in model.model_fields if name in knobs}
        for section, model in _SECTIONS.items()
    }
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1]).replace("_", "-")
        raise typer.BadParameter(f"{first['msg']}, got {first['input']!r}", param_hint=option) from None
