"""Builds the kernels of csrc/cuda with a C++ compiler, threads as fibers, and puts them in the place of the CPU's."""

import hashlib
import os
import subprocess
import warnings
from pathlib import Path

import torch

import trimserve.ops

__all__ = ["load_fibers"]

_ROOT = Path(__file__).parents[2]
_SOURCES = [
    *sorted((_ROOT / "csrc/cuda").glob("*.cu")),
    *(_ROOT / "csrc/cuda" / name for name in ("ops.cpp", "paging.cpp", "selection.cpp")),
    _ROOT / "csrc/op_checks.cpp",
    _ROOT / "tests/csrc/fibers/fibers.cpp",
]


def load_fibers() -> None:
    """Let ops on CPU tensors run the kernels of csrc/cuda from now on, in this process."""
    trimserve.ops.load_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that kernels are registered twice
        torch.ops.load_library(_build())


def _build() -> Path:
    torch_folder = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-shared", "-fPIC", "-fvisibility=hidden"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTRIMSERVE_CUDA_KEY=CPU"),
        *(f"-I{_ROOT / 'tests/csrc/fibers'}", f"-I{_ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")),
    ]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for folder in ("csrc", "csrc/cpu", "csrc/cuda", "tests/csrc/fibers"):
        for path in sorted((_ROOT / folder).glob("*.*")):
            digest.update(path.read_bytes())
    library = _ROOT / "build/fibers" / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *flags, "-x", "c++", *_SOURCES, "-o", partial, *libraries], check=True)
        partial.rename(library)
    return library
