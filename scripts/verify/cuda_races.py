"""Runs the CUDA kernels with the threads of a block as threads, under ThreadSanitizer; no GPU needed.

    python -m scripts.verify.cuda_races

First it must find the race of each kernel in tests/csrc/threads/racy.cpp, then none in csrc/cuda. What it sees is every
pair of accesses of a block that no barrier orders, whichever came first. Blocks run one after another: what one block
writes and another reads is not looked at.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ROOT / "tests/csrc/threads"
BUILD: Final = ROOT / "build/threads"
FOUND: Final = 66
"""Exit status of a program in which ThreadSanitizer found a race."""
RACES: Final = ("read_too_early", "write_too_early", "trust_an_exchange")


def main() -> int:
    """Build and run.

    Returns:
        Exit status.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        threads, racy, calls, *objects = pool.map(
            compiled, [*(SOURCES / f"{name}.cpp" for name in ("threads", "racy", "kernels")), *kernels]
        )
    racy_program = linked("racy", [threads, racy])
    for race in RACES:
        status, report = run(racy_program, race)
        if status != FOUND:
            print(f"ThreadSanitizer did not find the race of {race}, exit status {status}:\n{report}")
            return 1
    for program, arguments in ((racy_program, ["sound"]), (linked("kernels", [threads, calls, *objects]), [])):
        status, report = run(program, *arguments)
        if status != 0:
            print(report)
            return 1
    print(f"races: those of {len(RACES)} racy kernels were found, none in {len(kernels)} files of csrc/cuda")
    return 0


def compiled(source: Path) -> Path:
    """Compile a file for threads and ThreadSanitizer."""
    target = BUILD / f"{source.stem}.o"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DTRIMSERVE_REAL_THREADS", f"-I{ROOT / 'tests/csrc/fibers'}", f"-I{ROOT / 'csrc'}"]
    command = [os.environ.get("CXX", "g++"), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def linked(name: str, objects: list[Path]) -> Path:
    """Make a program."""
    program = BUILD / name
    subprocess.run([os.environ.get("CXX", "g++"), "-fsanitize=thread", *objects, "-o", program], check=True)
    return program


def run(program: Path, *arguments: str) -> tuple[int, str]:
    """Run a program.

    Returns:
        Its exit status, and what it said.
    """
    # ThreadSanitizer of older compilers finds no place for its shadow where addresses are random.
    setarch = shutil.which("setarch")
    fixed = [setarch, platform.machine(), "-R"] if setarch else []
    done = subprocess.run([*fixed, program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
