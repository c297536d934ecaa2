"""A control group (Linux) with a bound on memory, of either version; where none can be made, memory is only watched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["ControlGroup", "control_group"]

_ROOT = Path("/sys/fs/cgroup")


class ControlGroup:
    """A group of processes and what memory they hold."""

    def __init__(self, folder: Path | None, version: int) -> None:
        """Made by `control_group`."""
        self._folder = folder
        self._version = version

    @property
    def description(self) -> str:
        """How memory is bounded here."""
        return "watched only" if self._folder is None else f"control group, version {self._version}"

    @property
    def command(self) -> tuple[str, ...]:
        """What to put before a command so that it runs in the group."""
        if self._folder is None:
            return ()
        return ("sh", "-c", f'echo $$ > "{self._folder}/cgroup.procs" && exec "$@"', "sh")

    def held_bytes(self, pid: int) -> int:
        """Memory that cannot be dropped: anonymous and shared, of the group, or of the process and its children."""
        if self._folder is None:
            return sum(_resident_bytes(each) for each in _family(pid))
        stat = dict(line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        names = ("anon", "shmem") if self._version == 2 else ("total_rss", "total_shmem")
        return sum(int(stat.get(name, 0)) for name in names)


@contextmanager
def control_group(limit_bytes: int) -> Iterator[ControlGroup]:
    """A new group during the block; where none can be made, one that only watches.

    Args:
        limit_bytes: of memory; a process that would exceed it is killed.
    """
    name = f"trimserve-attack-{os.getpid()}"
    for folder, limit, version in (
        (_ROOT / "memory" / name, "memory.limit_in_bytes", 1),
        (_ROOT / name, "memory.max", 2),
    ):
        group = _made(folder, limit, limit_bytes, version)
        if group is not None:
            try:
                yield group
            finally:
                with suppress(OSError):
                    folder.rmdir()
            return
    yield ControlGroup(None, 0)


def _made(folder: Path, limit: str, limit_bytes: int, version: int) -> ControlGroup | None:
    try:
        folder.mkdir()
    except OSError:
        return None
    if not (folder / limit).exists():  # no memory controller here
        folder.rmdir()
        return None
    (folder / limit).write_text(str(limit_bytes))
    return ControlGroup(folder, version)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _family(int(child))


def _resident_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
