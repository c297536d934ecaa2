"""The inner loop of each kernel as the assembler made it: how many instructions it has, how many loads of 128 bits.

A kernel's inner loop is, among loops that hold no other, the one that loads the most bytes. Read from nvdisasm's
listing of a cubin; nvdisasm needs no GPU.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Loop", "find_nvdisasm", "inner_loops"]

_PACKAGE: Final = "nvidia-cuda-nvdisasm"
_WIDTHS: Final = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a load, by a part of its name; else 4."""


class Loop(NamedTuple):
    """Of a kernel."""

    num_bytes: int
    """That a thread loads in a turn, from global and shared memory."""
    num_instructions: int
    num_wide_loads: int
    """Of 128 bits."""


def find_nvdisasm() -> str | None:
    """Where the program is: on PATH, or else in its package."""
    try:
        owned = files(_PACKAGE) or []
    except PackageNotFoundError:
        owned = []
    of_package = [str(path.locate()) for path in owned if path.name == "nvdisasm"]
    return shutil.which("nvdisasm") or next(iter(of_package), None)


def inner_loops(nvdisasm: str, cubin: Path) -> dict[str, Loop]:
    """The inner loop of each kernel by its mangled name; without any, one of nothing."""
    listing = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", listing, flags=re.MULTILINE)
    return {
        name: max(_loops(body), default=Loop(0, 0, 0))
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
    }


def _loops(listing: str) -> Iterator[Loop]:
    """Those that hold no other, of one kernel."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            if target := re.search(r"BRA.*`\((\.L_\w+)\)", line):
                branches.append((len(instructions), target[1]))
            instructions.append(instruction[1])
    ends: dict[int, int] = {}
    for place, target_label in branches:
        begin = labels[target_label]
        if begin < place:  # a branch to itself is what the assembler puts behind the end
            ends[begin] = max(place, ends.get(begin, 0))
    for begin, end in ends.items():
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in ends.items()):
            yield _loop(instructions[begin : end + 1])


def _loop(instructions: list[str]) -> Loop:
    loads = [name.split(".") for name in instructions if name.startswith(("LDG", "LDS"))]
    widths = [next((_WIDTHS[part] for part in name if part in _WIDTHS), 4) for name in loads]
    return Loop(sum(widths), len(instructions), widths.count(16))
