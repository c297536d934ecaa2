"""Builds the kernels of csrc/cuda with a C++ compiler, threads as fibers, and puts them in the place of the CPU's."""

import hashlib
import os
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import trimserve.ops

__all__ = ["load_fibers", "load_fibers_for_cuda"]

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "build/fibers"
_TORCH = Path(torch.__file__).parent
_HEADERS = ("csrc", "csrc/cpu", "csrc/cuda", "tests/csrc/fibers")
_SOURCES = [
    *sorted((_ROOT / "csrc/cuda").glob("*.cu")),
    *(_ROOT / "csrc/cuda" / name for name in ("layers.cpp", "paging.cpp", "selection.cpp")),
    _ROOT / "csrc/op_checks.cpp",
    _ROOT / "tests/csrc/fibers/fibers.cpp",
]


def load_fibers() -> None:
    """Let ops on CPU tensors run the kernels of csrc/cuda from now on, in this process."""
    trimserve.ops.load_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that kernels are registered twice
        torch.ops.load_library(_build("CPU"))


def load_fibers_for_cuda() -> Path:
    """Let ops on CUDA tensors run the kernels of csrc/cuda on memory of the host, in a process without a GPU.

    Returns:
        The library.
    """
    trimserve.ops.load_library()
    library = _build("CUDA")
    torch.ops.load_library(library)
    return library


def _build(dispatch_key: str) -> Path:
    registration = _compiled(_ROOT / "csrc/cuda/ops.cpp", f"-DTRIMSERVE_CUDA_KEY={dispatch_key}")
    guard = [] if dispatch_key == "CPU" else [_compiled(_ROOT / "tests/csrc/fibers/guard.cpp")]
    objects = [registration, *guard, *map(_compiled, _SOURCES)]
    library = _FOLDER / f"{_digest(*(each.name for each in objects))}.so"
    libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return _made(library, ["-shared", *map(str, objects), *libraries])


def _compiled(source: Path, *definitions: str) -> Path:
    flags = [
        *("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", *definitions),
        *(f"-I{_ROOT / 'tests/csrc/fibers'}", f"-I{_ROOT / 'csrc'}", "-isystem", str(_TORCH / "include")),
    ]
    headers = [path for folder in _HEADERS for path in sorted((_ROOT / folder).glob("*.h"))]
    digest = _digest(*flags, *(path.read_text() for path in [source, *headers]))
    return _made(_FOLDER / f"{source.stem}.{digest}.o", [*flags, "-x", "c++", "-c", str(source)])


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _made(target: Path, arguments: Sequence[str]) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), *arguments, "-o", partial], check=True)
        partial.rename(target)
    return target
