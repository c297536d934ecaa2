"""Generates trimserve/v1 from protos/ with the pinned grpcio-tools; `--check` only compares.

Usage: python -m scripts.generate.protos [--check]
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("trimserve/v1")
GRPCIO_TOOLS = "1.76.0"
"""Newer generators refuse the protobuf 6 runtimes that other packages of a deployment may need."""

INIT = '"""Generated from protos/trimserve/v1 by scripts/generate/protos.py; never edited."""\n'


def generate(folder: Path) -> None:
    """Write the package of generated code into a folder.

    Args:
        folder: gets `trimserve/v1`; must exist.
    Raises:
        RuntimeError: wrong version of grpcio-tools, or protoc refused the protos.
    """
    installed = version("grpcio-tools")
    if installed != GRPCIO_TOOLS:
        raise RuntimeError(f"grpcio-tools must be {GRPCIO_TOOLS}, got {installed}")
    protos = sorted(str(path) for path in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *protos]
    # protoc looks for its plugins on the path; ours are beside the Python that runs this.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if run.returncode != 0:
        raise RuntimeError(f"protoc failed: {run.stderr}")
    (folder / PACKAGE / "__init__.py").write_text(INIT)


def differences(fresh: Path, committed: Path) -> list[str]:
    """Names of files that are missing, stale or too many in the committed package.

    Args:
        fresh: package just generated.
        committed: package in the tree.
    """
    fresh_names = {path.name for path in fresh.iterdir()}
    committed_names = {path.name for path in committed.iterdir() if path.is_file()}
    _, stale, missing = filecmp.cmpfiles(fresh, committed, sorted(fresh_names), shallow=False)
    return sorted({*stale, *missing, *(committed_names - fresh_names)})


def main() -> int:
    """Generate or check; the exit status is 1 when the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = Path(folder) / PACKAGE, ROOT / PACKAGE
        if check:
            stale = differences(fresh, committed)
            if stale:
                print(f"{PACKAGE} is out of step with protos/: {', '.join(stale)}; run `make protos`")
            return 1 if stale else 0
        shutil.rmtree(committed, ignore_errors=True)
        shutil.copytree(fresh, committed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
