"""Builds the ops with the headers of several torch releases and loads them; needs nvcc, but no GPU.

    python -m scripts.verify.cuda_build 2.10.0 2.11.0 2.13.0

A GPU machine may have another torch than this one, and what its headers lack shows here. Only the headers of a
release are fetched, about 10 MB, out of its wheel on PyPI, and kept in build/torch. Kernels know no torch and are
compiled once. Where this torch is without CUDA, the ops are linked with a stand-in for torch's CUDA library.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Final

import torch

ROOT: Final = Path(__file__).parents[2]
BUILD: Final = ROOT / "build/cuda"
_INDEX: Final = "https://pypi.org/simple/torch/"
_LOAD: Final = "import sys, torch; [torch.ops.load_library(path) for path in sys.argv[1:]]"


def main() -> int:
    """Build and load with each release.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("releases", nargs="+", help="of torch, such as 2.11.0")
    releases: list[str] = parser.parse_args().releases
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: it is part of the CUDA toolkit, 13.0 or newer, and needs no GPU")
        return 1
    libraries = [BUILD / f"_ops_{name}.so" for name in ("cpu", "cuda")]
    for release in releases:
        build(include_folder(release))
        subprocess.run([sys.executable, "-c", _LOAD, *libraries], check=True)
        print(f"torch {release}: _ops_cpu and _ops_cuda were compiled, linked and loaded", flush=True)
    return 0


def build(include: Path) -> None:
    """Compile and link the ops in `BUILD`.

    Args:
        include: folder with torch's headers.
    """
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    settings = {
        "TRIMSERVE_CUDA": "ON",
        "TRIMSERVE_TORCH_INCLUDE": include,
        "CMAKE_BUILD_TYPE": "Release",
        "SKBUILD_PROJECT_VERSION": "0",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "CI": "1"}  # a warning is an error
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", *options]
    subprocess.run(configure, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    make = ["cmake", "--build", str(BUILD), "--target", "_ops_cuda", "_ops_cpu"]
    subprocess.run(make, cwd=ROOT, env=environment, check=True)


def include_folder(release: str) -> Path:
    """The headers of a release of torch: this one's, those fetched before, or fetched now.

    Raises:
        SystemExit: there is no wheel of that release.
    """
    if torch.__version__.partition("+")[0] == release:
        return Path(torch.__file__).parent / "include"
    folder = ROOT / "build/torch" / release
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(io.BufferedReader(_RemoteFile(_wheel(release)), 1 << 20)) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("torch/include/")]
            wheel.extractall(partial, names)
        partial.rename(folder)
    return folder / "torch/include"


def _wheel(release: str) -> str:
    """Address of a release's wheel; those for all Pythons have the same headers."""
    request = urllib.request.Request(_INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as page:
        files = json.load(page)["files"]
    for file in files:
        if file["filename"].startswith(f"torch-{release}-cp311-") and file["filename"].endswith("x86_64.whl"):
            return str(file["url"])
    raise SystemExit(f"{_INDEX} has no wheel of torch {release} for Python 3.11 and x86_64")


class _RemoteFile(io.RawIOBase):
    """A file on a web server, read in parts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]  # a memoryview is what it is given
        last = min(self._position + len(buffer), self._size) - 1
        if last < self._position:
            return 0
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._position}-{last}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


if __name__ == "__main__":
    sys.exit(main())
