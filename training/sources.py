"""Fetches what harder pictures are made of, by package name: `python -m training.sources`.

Packages of Debian and npm are downloaded and unpacked, not installed, into a folder that git ignores; nothing of them
is committed. Needs `apt-get` and `dpkg-deb` of Debian 12. README.md lists the licences. It knows packages and files,
and nothing of what is done with them.
"""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from urllib.request import urlopen

__all__ = ["NPM_PACKAGES", "PACKAGES", "find_files", "main", "packages_folder"]

PACKAGES: dict[str, str] = {
    "tuxpaint-stamps-default": "2022.06.04-1",
    "openclipart-png": "1:0.18+dfsg-19",
    "fonts-noto-color-emoji": "2.042-0+deb12u1",
    "plasma-workspace-wallpapers": "4:5.27.5-2",
    "gnome-backgrounds": "43.1-1",
    "fonts-dejavu-core": "2.37-6",
    "fonts-freefont-ttf": "20120503-10",
    "fonts-liberation": "1:1.07.4-11",
    "ruby-gemojione": "3.3.0-1",
}
"""Debian package and version. Photographs come with scikit-image and scikit-learn as well."""

NPM_PACKAGES: dict[str, str] = {
    "fluentui-emoji": "1.3.0",
    "openmoji": "17.0.0",
    "@twemoji/svg": "15.0.0",
}
"""npm package and version."""

_NPM_REGISTRY = "https://registry.npmjs.org"
_SHA512 = {
    "fluentui-emoji": "JTXXwqIie2rWTgOkIJDJxr0WtwTz2WU4kdOq8buLVThYwQ264aFR2jdTyuon2oEbLqqGMT64zI4btyn1saB2xw==",
    "openmoji": "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    "@twemoji/svg": "ZSPef2B6nBaYnfgdTbAy4jgW95o7pi2xPGwGCU+WMTxo7J6B1lMPTWwSq/wTuiMq+N0khQ90CcvYp1wFoQpo/w==",
}
"""Of the archives, in base64; apt checks Debian's by itself."""
_SECONDS = 60.0


def packages_folder() -> Path:
    """Where packages are unpacked: `TRIMSERVE_SOURCES`, or a folder of the checkout that git ignores."""
    return Path(os.environ.get("TRIMSERVE_SOURCES", Path(__file__).parent / "runs" / "sources"))


def find_files(package: str, pattern: str) -> list[Path]:
    """Files of a package, which is fetched first where it is not there.

    Args:
        package: a key of `PACKAGES` or `NPM_PACKAGES`.
        pattern: below the package's root, as `Path.glob` takes it.
    Returns:
        The files in order of their names; at least one.
    Raises:
        FileNotFoundError: the package has no such file.
        RuntimeError: the package cannot be had.
    """
    root = _unpacked(package)
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if not found:
        version = {**PACKAGES, **NPM_PACKAGES}[package]
        raise FileNotFoundError(f"{package} {version}: no file matches {pattern!r}")
    return found


def _unpacked(package: str) -> Path:
    target = packages_folder() / package
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        part = Path(name)
        if package in NPM_PACKAGES:
            _fetch_from_npm(package, part)
        else:
            _fetch_from_debian(package, part)
        shutil.move(part / "files", target)
    return target


def _fetch_from_debian(package: str, folder: Path) -> None:
    _run(["apt-get", "download", f"{package}={PACKAGES[package]}"], folder)
    _run(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "files"], folder)


def _fetch_from_npm(package: str, folder: Path) -> None:
    address = f"{_NPM_REGISTRY}/{package}/-/{package.rpartition('/')[2]}-{NPM_PACKAGES[package]}.tgz"
    try:
        with urlopen(address, timeout=_SECONDS) as answer:
            archive = answer.read()
    except OSError as error:
        raise RuntimeError(f"{address}: {error}") from error
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != _SHA512[package]:
        raise RuntimeError(f"{address}: its SHA-512 must be {_SHA512[package]}, got {found}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder / "files", filter="data")


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]}: not found; packages are fetched on Debian 12") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)}: {error.stderr.strip()}") from error


def main() -> None:
    """Command line: fetch every package."""
    for package in (*PACKAGES, *NPM_PACKAGES):
        print(_unpacked(package))


if __name__ == "__main__":
    main()
