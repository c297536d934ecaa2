"""Compiles the CUDA kernels, no GPU needed, and holds each to its budget: registers, shared memory, spills, inner loop.

    python -m scripts.verify.cuda_check [--update]

The budget is csrc/cuda/budget.json, one row per kernel and architecture. Without nvcc it says so, as the last words of
`make check`, and does nothing. Inner loops are those of cuda_loops.py; of each its instructions are counted, and its
loads of 128 bits, of which there may not be fewer than its budget says.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from scripts.verify.cuda_loops import Loop, find_nvdisasm, inner_loops

ROOT = Path(__file__).parents[2]
BUDGET = ROOT / "csrc/cuda/budget.json"
ARCHITECTURES: Final = ("sm_80", "sm_90")
MISSING: Final = (
    "SKIPPED: nvcc is not on PATH, so the CUDA kernels were not compiled. It is part of the CUDA toolkit, 13.0 or "
    "newer (https://developer.nvidia.com/cuda-downloads), and needs no GPU. Their tests on the CPU need g++ only."
)
MISSING_DISASSEMBLER: Final = (
    "nvdisasm is not there, so the kernels' inner loops were not read: pip install nvidia-cuda-nvdisasm"
)
Row = dict[str, str | int]


def main() -> int:
    """Compile, then compare with the budget or write it.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what the kernels use as their budget")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print(MISSING)
        return 0
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        print(MISSING_DISASSEMBLER)
        return 1
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        used = [row for rows in pool.map(partial(compile_kernels, nvdisasm=nvdisasm), sources) for row in rows]
    if arguments.update:
        lines = ",\n  ".join(json.dumps(with_slack(row)) for row in used)
        BUDGET.write_text(f"[\n  {lines}\n]\n")
        return 0
    complaints = list(compare(used, json.loads(BUDGET.read_text())))
    print("\n".join(complaints) or f"{len(used)} kernels within their budget")
    return bool(complaints)


def compile_kernels(source: Path, nvdisasm: str) -> list[Row]:
    """What the assembler says of a file's kernels, for every architecture, and what it made of them."""
    rows: list[Row] = []
    for architecture in ARCHITECTURES:
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "cubin"
            command = ["nvcc", "-std=c++20", "-O3", "-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}"]
            command += [f"-arch={architecture}", "-cubin", str(source), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(done.stdout + done.stderr)
            rows += parse(source.name, done.stderr, inner_loops(nvdisasm, cubin))
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def parse(file: str, report: str, loops: dict[str, Loop]) -> Iterator[Row]:
    """Rows of an assembler's report, and of the inner loops of its kernels."""
    kernels = report.split("Compiling entry function '")[1:]
    names = [kernel.split("'", 1)[0] for kernel in kernels]
    demangled = subprocess.run(
        ["c++filt", "-p", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for kernel, mangled, name in zip(kernels, names, demangled, strict=True):
        shared = re.search(r"(\d+) bytes smem", kernel)
        yield {
            "file": file,
            "kernel": name.split("::")[-1] if "<" not in name else re.sub(r"^.*::(\w+<)", r"\1", name),
            "architecture": find(r"for '(sm_\d+)'", kernel),
            "registers": int(find(r"Used (\d+) registers", kernel)),
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(find(r"(\d+) bytes stack frame", kernel)),
            "spilled_bytes": int(find(r"(\d+) bytes spill stores", kernel)),
            "loop_instructions": loops[mangled].num_instructions,
            "loop_wide_loads": loops[mangled].num_wide_loads,
        }


def find(pattern: str, text: str) -> str:
    """The group of the pattern, which is there."""
    match = re.search(pattern, text)
    assert match, f"the assembler does not say {pattern}"
    return match[1]


def with_slack(row: Row) -> Row:
    """Registers are given out by eights; of a loop's instructions a few more or less say nothing."""
    return row | {name: -(-int(row[name]) // 8) * 8 for name in ("registers", "loop_instructions")}


def compare(used: list[Row], budget: list[Row]) -> Iterator[str]:
    """What is over its budget, and what has none or has one for nothing."""

    def key(row: Row) -> str:
        return f"{row['file']} {row['kernel']} {row['architecture']}"

    allowed = {key(row): row for row in budget}
    for row in used:
        limits = allowed.pop(key(row), None)
        if limits is None:
            yield f"{key(row)}: not in {BUDGET.name}; scripts/verify/cuda_check.py --update"
            continue
        for name in ("registers", "shared_bytes", "stack_bytes", "spilled_bytes", "loop_instructions"):
            if int(row[name]) > int(limits[name]):
                yield f"{key(row)}: {row[name]} {name}, {limits[name]} allowed"
        if int(row["loop_wide_loads"]) < int(limits["loop_wide_loads"]):
            yield f"{key(row)}: {row['loop_wide_loads']} loop_wide_loads, {limits['loop_wide_loads']} expected"
    yield from (f"{name}: in {BUDGET.name}, but there is no such kernel" for name in allowed)


if __name__ == "__main__":
    sys.exit(main())
