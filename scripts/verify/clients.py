"""Runs the commands of each README in examples/ against a server of the embedded model.

What `apt-get` is to install is installed (as root, on Debian) where it is missing.

Usage: python -m scripts.verify.clients [LANGUAGE...]
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from trimserve.config import Config, ServerConfig
from trimserve.serve import in_process_server, make_runner, make_server
from trimserve.server.running import InProcessServer

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("cpp", "go", "node")
"""Beside Python, which tests/test_examples.py runs."""

DOCUMENTED = "127.0.0.1:50051"
NOBODY = "127.0.0.1:1"
README_ASK = re.compile(r"^\$ (node .+)$", re.MULTILINE)
ANSWER = re.compile(r".+\nkept \d+ of \d+ visual features, \d+ merged rows\n")


def main() -> None:
    """Try the clients of the languages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(LANGUAGES)}; default: all")
    languages = parser.parse_args().languages or LANGUAGES
    with tempfile.TemporaryDirectory() as folder:
        for name in ("protos", "trimserve"):
            (Path(folder) / name).symlink_to(ROOT / name)
        with in_process_server() as server:
            for language in languages:
                answer = verify(ROOT / "examples" / language, Path(folder) / "examples" / language, server.address)
                print(f"{language}: {answer}")
        if "node" in languages:
            verify_access(Path(folder) / "examples/node")
            print("node: no token, a wrong one, an expired certificate and a right one are told apart")


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


def verify_access(folder: Path) -> None:
    """Four clients in Node of a server with mutual TLS and tokens: each ends as it should.

    Args:
        folder: what `verify` made.
    Raises:
        SystemExit: one does not.
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issue(authority, folder, "server", "localhost")
    issue(authority, folder, "valid", "a-client")
    issue(authority, folder, "expired", "a-client", not_after=datetime.now(UTC) - timedelta(days=1))
    digest = hashlib.sha256(b"right").hexdigest()
    (folder / "clients.toml").write_text(f'[clients.node]\ntoken_sha256 = ["{digest}"]\n')
    files = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem", "auth_file": "clients.toml"}
    knobs = {knob: folder / name for knob, name in files.items()}
    config = Config(server=ServerConfig.model_validate({"port": 0, "metrics_port": 0, **knobs}))
    with InProcessServer(make_server(make_runner(config), config)) as server:
        ask = README_ASK.search((ROOT / "examples/node/README.md").read_text())
        assert ask is not None
        command = ask[1].replace(DOCUMENTED, server.address.replace("127.0.0.1", "localhost"))
        for certificate, token, status in (
            ("valid", "", "UNAUTHENTICATED"),
            ("valid", "wrong", "UNAUTHENTICATED"),
            ("expired", "right", "UNAVAILABLE"),
            ("valid", "right", None),
        ):
            own = f"TRIMSERVE_CA=ca.pem TRIMSERVE_CERT={certificate}.pem TRIMSERVE_KEY={certificate}.key"
            said = run(f"{own} TRIMSERVE_TOKEN={token} {command} 2>&1", folder, expected=0 if status is None else 1)
            if not (ANSWER.fullmatch(said) if status is None else said.startswith(f"{status}: ")):
                raise SystemExit(
                    f"{certificate} certificate, token {token!r}: expected {status or 'an answer'}, got {said}"
                )


def issue(authority: trustme.CA, folder: Path, name: str, identity: str, not_after: datetime | None = None) -> None:
    """Write a certificate and its key."""
    issued = authority.issue_cert(identity, not_after=not_after)
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / f"{name}.key")


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
