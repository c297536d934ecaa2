"""The command line: puts the commands of `commands/` and `evaluation/` together, and makes their errors one line.

Without `--address`, the commands that ask a question start a server of their own on a free port and talk gRPC to it,
too. The knobs of `config.py` are options and environment variables of the commands that use them.
"""

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import grpc
import typer

from trimserve import __version__
from trimserve.batch.journal import JournalError
from trimserve.commands.batch import batch
from trimserve.commands.chat import chat
from trimserve.commands.explain import explain
from trimserve.commands.generate import generate
from trimserve.commands.info import info
from trimserve.commands.plan import plan
from trimserve.commands.playground import playground
from trimserve.commands.question import policy_help
from trimserve.commands.serve import serve
from trimserve.commands.status import status
from trimserve.commands.together import CheckedCommand
from trimserve.distillation.command import train_compressor
from trimserve.engine.workers import is_any_left_behind
from trimserve.environment import shut_out
from trimserve.errors import TrimserveError
from trimserve.evaluation.codebook_command import codebook
from trimserve.evaluation.command import evaluate
from trimserve.evaluation.dataset import DatasetError
from trimserve.refusal import Refusal

__all__ = ["about", "app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises where a command is typed wrongly; it exports this parameter's error only."""


def main() -> None:
    """Entry point of `trimserve`; errors that a user can fix are one line and exit status 1 or 2, Ctrl-C is 130."""
    shut_out()
    _open_missing_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may have signs that the terminal does not
    try:
        _run()
    except SystemExit as end:
        is_interrupted = end.code == _INTERRUPTED
        if is_interrupted:
            with suppress(OSError):
                print("interrupted", file=sys.stderr)
        if is_interrupted or is_any_left_behind():
            _leave(end.code)
        raise


def _open_missing_streams() -> None:
    """A stream that the caller has closed is empty; otherwise the next file or socket would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # until the process ends


def _run() -> None:
    try:
        status = app(standalone_mode=False, prog_name="trimserve")  # otherwise typer draws a box around a usage error
        raise SystemExit(status)
    except _UsageError as error:
        _refuse_usage(error)
    except grpc.RpcError as error:
        _fail(str(Refusal.of(error)))
    except UnicodeEncodeError as error:  # what a shell in another encoding hands on, as text that is sent
        _fail(f"error: what is typed must be UTF-8, got {error.object!r}", 2)
    except OSError as error:
        is_of_a_file = error.filename is not None and error.strerror is not None
        _fail(f"error: {error.filename}: {error.strerror}" if is_of_a_file else f"error: {error}")
    except (TrimserveError, DatasetError, JournalError) as error:
        _fail(f"error: {error}")


def _refuse_usage(error: Any) -> NoReturn:
    message = error.format_message()
    if not message:  # no command was given, and the help is printed
        raise SystemExit(error.exit_code) from None
    message = message.replace(": Value error, ", ": ")  # pydantic says so of errors that a validator words
    command = error.ctx.command_path if error.ctx else "trimserve"
    _fail(f"error: {message.rstrip('.')} (see {command} --help)", error.exit_code)


def _fail(message: str, status: int = 1) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(status) from None


def _leave(status: object) -> NoReturn:
    """End at once: a thread that hangs or loads a model in compiled code would abort Python's normal exit."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status if isinstance(status, int) else 0)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"trimserve {__version__}")
        raise typer.Exit


@app.callback()
def about(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve Llama-3.2-Vision, keeping only the visual features that the text attends to."""


app.command(cls=CheckedCommand)(serve)
app.command(epilog=policy_help(), cls=CheckedCommand)(generate)
app.command(epilog=policy_help(), cls=CheckedCommand)(chat)
app.command(cls=CheckedCommand)(batch)
app.command(epilog=policy_help(), cls=CheckedCommand)(explain)
app.command(cls=CheckedCommand)(playground)
app.command(cls=CheckedCommand)(status)
app.command(cls=CheckedCommand)(info)
app.command(cls=CheckedCommand)(plan)
app.command("eval", cls=CheckedCommand)(evaluate)
app.add_typer(codebook, name="codebook")
app.command("train-compressor", cls=CheckedCommand)(train_compressor)
