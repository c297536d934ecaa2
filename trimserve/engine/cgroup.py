"""How much memory the limits of this process's control groups leave it: those of containers, services and jobs.

Linux has two versions of control groups, and some machines have both. A group lies within others, and the limit of each
counts. The kernel's files are described in its `admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/memory.rst`.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

__all__ = ["CGROUPS", "OWN_GROUPS", "memory_left"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

_NO_LIMIT = 2**60
"""The first version writes a number that no machine has, the second one `max`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Version:
    """Files of a group."""

    limits: tuple[str, ...]
    usage: str


# Beyond `memory.high` a process is not killed, but slowed down until it hardly moves.
_V2 = _Version(("memory.max", "memory.high"), "memory.current")
_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes")


def memory_left(root: Path = CGROUPS, own: Path = OWN_GROUPS) -> int | None:
    """Bytes that the tightest limit leaves, below 0 where more is used; None without a limit.

    What cannot be understood is logged once, and counts as if it were not there.

    Args:
        root: where the groups are mounted.
        own: the kernel's list of the groups that this process is in.
    """
    paths = _own_paths(own)
    hierarchies = [(_V2, root, "")]
    if not (root / "cgroup.procs").exists():  # no group itself: it holds the hierarchies of the first version, or part
        mixed = [(_V1, root / "memory", "memory"), (_V2, root / "unified", "")]
        hierarchies = [each for each in mixed if each[1].is_dir()] or hierarchies
    left = [
        limit - _used(version, group)
        for version, folder, controller in hierarchies
        for group in _groups(version, folder, paths.get(controller, "/"))
        if (limit := _limit(version, group)) is not None
    ]
    return min(left, default=None)


def _own_paths(own: Path) -> dict[str, str]:
    """Path of the group by controller; in the second version, which has one path for all, that is the empty string."""
    lines = (line.split(":", 2) for line in _text(own).splitlines())
    return {controller: fields[2] for fields in lines if len(fields) == 3 for controller in fields[1].split(",")}


def _groups(version: _Version, folder: Path, path: str) -> Iterator[Path]:
    """The group of a path, and those that it lies within."""
    names = [name for name in PurePosixPath(path).parts if name not in ("/", "..")]
    # A container sees its own group, or one around it, as the root: the path begins with names that are not there.
    for start in range(len(names) + 1):
        group = folder.joinpath(*names[start:])
        if group.is_dir():
            break
    if group == folder and not (folder / "cgroup.procs").exists():
        group = _only_limited_group(version, folder)
    yield group
    while group != folder:
        group = group.parent
        yield group


def _only_limited_group(version: _Version, folder: Path) -> Path:
    """The innermost group with a limit where a sandbox shows just a part of the tree, and no group as its root."""
    try:
        found = {file.parent for name in version.limits for file in folder.rglob(name)}
    except OSError:  # a group ended while it was looked at
        return folder
    limited = sorted((group for group in found if _limit(version, group) is not None), key=lambda each: len(each.parts))
    if not limited:
        return folder
    innermost = limited[-1]
    if all(group == innermost or group in innermost.parents for group in limited):
        return innermost
    _warn(f"{folder}: memory limits of several control groups, none of them known to be ours; they are ignored")
    return folder


def _limit(version: _Version, group: Path) -> int | None:
    limits = (_number(group / name) for name in version.limits)
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def _used(version: _Version, group: Path) -> int:
    usage = _number(group / version.usage)
    if usage is None:
        _warn(f"{group / version.usage}: does not tell what is used; the whole limit counts as free")
        return 0
    pairs = (line.split() for line in _text(group / "memory.stat").splitlines())
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and _is_number(pair[1])}
    # Counted as used, though the kernel drops it when memory is wanted; `MemAvailable` leaves it out, too. The first
    # version tells it for the group alone, and in `total_` with the groups within.
    page_cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
    return max(0, usage - page_cache)


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    if _is_number(text):
        return int(text)
    if text != "max" and file.exists():
        _warn(f"{file}: must be a number of bytes or max, got {text[:40]!r}; it is ignored")
    return None


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,20}", text) is not None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there, or not for us
        return ""


@cache  # the files are read for every page of metrics
def _warn(message: str) -> None:
    log.warning(message)
