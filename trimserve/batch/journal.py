"""The output of a batch, which is its journal, too: what is in it is done.

A line is written at once, and ends with its newline. So whenever the process is killed, all lines are whole but
possibly the last, which is cut off when the batch goes on. One process writes at a time.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trimserve.batch.lines import Line

__all__ = ["Journal", "JournalError"]


_BEGINNING = b'{"index": '
"""Of every line."""


class JournalError(Exception):
    """The output file cannot be continued; says why, and which file."""


class Journal:
    """An output file; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open, lock and read it; a last line that is torn is cut off.

        Args:
            path: created if it does not exist.
        Raises:
            JournalError: it is none, or another process writes it.
            OSError: it cannot be opened.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise JournalError(f"{path}: must be a regular file, because a batch that is killed goes on from it")
        self._file = path.open("a+b", buffering=0)
        self._done: dict[int, str] = {}
        self.num_errors = 0
        """Lines with an error instead of an answer."""
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._done)

    def compare(self, lines: Iterable[Line]) -> tuple[int, set[int]]:
        """Hold it against the input.

        Args:
            lines: all of the input.
        Returns:
            How many there are, and the indices of those that are not done.
        Raises:
            JournalError: a line is done that the input does not have, or has another one in its place.
        """
        digests = {line.index: line.digest for line in lines}
        for index, digest in self._done.items():
            if digests.get(index) != digest:
                raise JournalError(
                    f"{self._path}: has an answer to another line {index} (counted from 0) than the input has; "
                    "write to another file, or remove this one"
                )
        return len(digests), digests.keys() - self._done.keys()

    def write(self, line: Line, id_: Any, outcome: Mapping[str, Any]) -> None:
        """Write what came of a line of the input.

        Args:
            line: of the input, not done.
            id_: of the line; None leaves it out.
            outcome: `response` or `error`.
        Raises:
            OSError: it cannot be written, for instance because the disk is full.
        """
        document = {"index": line.index, **({} if id_ is None else {"id": id_}), "input": line.digest, **outcome}
        # A path may have bytes that are no UTF-8; escaped as JSON does it, they are.
        rest = memoryview(json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]
        self._note(document)

    def sync(self) -> None:
        """Have the system write all of it to the disk."""
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self._path}: another process writes it") from None

    def _read(self) -> None:
        end = 0
        self._file.seek(0)
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and _is_torn(line):
                    break
                self._read_line(number, line)
                end += len(line)
        self._file.truncate(end)

    def _read_line(self, number: int, line: bytes) -> None:
        try:
            document = json.loads(line)
            is_ours = isinstance(document["index"], int) and isinstance(document["input"], str)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise JournalError(
                f"{self._path}: line {number} was not written by a batch; write to another file, or remove this one"
            )
        if document["index"] in self._done:
            raise JournalError(f"{self._path}: line {number} is the second one with index {document['index']}")
        self._note(document)

    def _note(self, document: Mapping[str, Any]) -> None:
        self._done[document["index"]] = document["input"]
        self.num_errors += "error" in document


def _is_torn(line: bytes) -> bool:
    """Whether an unfinished line may be what a crash left: the beginning of ours, or zeros where it would be."""
    return _BEGINNING.startswith(line[: len(_BEGINNING)]) or not line.strip(b"\0")
