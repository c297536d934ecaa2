"""`trimserve batch`: answers the requests of a file into another, and goes on where it was stopped."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from trimserve.batch.asking import Asker, completed
from trimserve.batch.journal import Journal
from trimserve.batch.lines import id_of, read_lines
from trimserve.commands.server import OWN_SERVER, asked_server
from trimserve.config import Config
from trimserve.connection import Connection, with_connection
from trimserve.image_files import STANDARD_INPUT
from trimserve.knobs import with_knobs

__all__ = ["batch"]

_CONCURRENCY: Final = 32  # twice the default max_batch: while some decode, the next are prepared


@with_knobs("model", "engine")
@with_connection(OWN_SERVER)
def batch(
    requests: Annotated[
        str,
        typer.Argument(
            metavar="IN.JSONL",
            help="A request on each line: any field of GenerateRequest, or prompt, system and images (paths relative "
            "to this file); id is repeated in the output. - is standard input.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.JSONL",
            help="A line for each, as they are done: index, id, and response or error. What it has already is not "
            "asked again.",
        ),
    ],
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = _CONCURRENCY,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Answer a file of requests; stopped or killed, the same command goes on where it was."""
    folder = Path() if requests == STANDARD_INPUT else Path(requests).parent
    with _opened(requests) as file, Journal(out) as journal:
        total, missing = journal.compare(read_lines(file))
        try:
            if missing:
                with asked_server(connection, config) as client, _progress(total, len(journal)) as advance:
                    asker = Asker(client, folder)
                    lines = (line for line in read_lines(file) if line.index in missing)
                    for line, outcome in completed(asker, lines, concurrency):
                        journal.write(line, id_of(line), outcome)
                        advance(journal.num_errors)
        finally:
            journal.sync()
            left = f", {total - len(journal)} left: the same command goes on" if len(journal) < total else ""
            answers = len(journal) - journal.num_errors
            print(f"{out}: {answers} answers, {journal.num_errors} errors{left}", file=sys.stderr)


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The input, which is read several times; standard input is copied to a file for that."""
    if name != STANDARD_INPUT:
        with Path(name).open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        yield copy


class _Rate(ProgressColumn):
    """Lines in a second, lately."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; what is yielded moves it on by a line, and takes the number of errors so far."""
    errors = TextColumn("{task.fields[errors]} errors")
    columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), _Rate(), errors, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, errors=0)
        yield lambda num_errors: bar.update(task, advance=1, errors=num_errors)
