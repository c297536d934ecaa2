"""Runs the commands of each README in examples/ against a server of the embedded model.

What `apt-get` is to install is installed (as root, on Debian) where it is missing.

Usage: python scripts/verify_clients.py [LANGUAGE...]
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from trimserve.local import in_process_server

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("cpp", "go", "node")
"""Beside Python, which tests/test_examples.py runs."""

DOCUMENTED = "127.0.0.1:50051"
NOBODY = "127.0.0.1:1"
ANSWER = re.compile(r".+\nkept \d+ of \d+ visual features, \d+ merged rows\n")


def main() -> None:
    """Try the clients of the languages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(LANGUAGES)}; default: all")
    languages = parser.parse_args().languages or LANGUAGES
    with in_process_server() as server, tempfile.TemporaryDirectory() as folder:
        for name in ("protos", "trimserve"):
            (Path(folder) / name).symlink_to(ROOT / name)
        for language in languages:
            answer = verify(ROOT / "examples" / language, Path(folder) / "examples" / language, server.address)
            print(f"{language}: {answer}")


def verify(source: Path, folder: Path, address: str) -> str:
    """Run a README's commands in a copy of its folder; the last one asks.

    Args:
        source: the client.
        folder: to be made, beside protos and samples.
        address: of a server.
    Returns:
        The answer.
    Raises:
        SystemExit: a command failed, or the client does not print what it should.
    """
    tracked = subprocess.run(["git", "ls-files"], cwd=source, check=True, capture_output=True, text=True).stdout
    folder.mkdir(parents=True)
    for name in tracked.split():
        shutil.copy(source / name, folder)
    *preparations, ask = re.findall(r"^\$ (.+)$", (source / "README.md").read_text(), re.MULTILINE)
    for command in preparations:
        if not command.startswith("sudo apt-get install"):
            run(command, folder)
        elif missing := [package for package in command.split()[3:] if not is_installed(package)]:
            install = "apt-get install --quiet --quiet --yes --no-install-recommends"
            run(f"apt-get update --quiet --quiet && {install} {' '.join(missing)}", folder)
    answer = run(ask.replace(DOCUMENTED, address), folder)
    if not ANSWER.fullmatch(answer):
        raise SystemExit(f"{source.name}: expected an answer and its account, got {answer!r}")
    run(ask.replace(DOCUMENTED, NOBODY), folder, expected=1)
    return answer.partition("\n")[0]


def is_installed(package: str) -> bool:
    """Whether Debian's package is there."""
    query = ["dpkg-query", "--show", "--showformat=${Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "install ok installed"


def run(command: str, folder: Path, expected: int = 0) -> str:
    """Standard output of a shell command.

    Raises:
        SystemExit: another exit status than the expected one.
    """
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != expected:
        raise SystemExit(f"{command}: exit status {done.returncode}, expected {expected}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
