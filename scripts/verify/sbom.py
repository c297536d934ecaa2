"""Writes out/sbom.json, the bill of materials (CycloneDX) of what the image installs, and holds it against the lock.

Usage: PYTHONPATH=build/sbom python -m scripts.verify.sbom
"""

import json
import subprocess
import sys

from scripts.generate.lock import FOLDER, ROOT, TORCH, pins

SBOM = ROOT / "out/sbom.json"


def write() -> None:
    """Of everything in the lock, and torch, which stands beside it."""
    SBOM.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--output-reproducible", "--validate", "--output-file", str(SBOM)]
    locked = (FOLDER / "serve.txt").read_text()
    subprocess.run(command, input=f"{locked}\n{TORCH}\n", text=True, check=True)


def check() -> int:
    """How many components there are.

    Raises:
        SystemExit: something that is locked is missing, or has no hashes.
    """
    components = json.loads(SBOM.read_text())["components"]
    found = {(each["name"].lower(), each["version"]) for each in components}
    hashed = {each["name"].lower() for each in components if _has_hashes(each)}
    locked = pins("serve.txt")
    missing = {(name, version) for name, versions in locked.items() for version in versions} - found
    if missing or locked.keys() - hashed or tuple(TORCH.split("==")) not in found:
        sys.exit(f"sbom: without {sorted(missing)}, without hashes of {sorted(locked.keys() - hashed)}")
    return len(components)


def _has_hashes(component: dict[str, object]) -> bool:
    references = component.get("externalReferences")
    return isinstance(references, list) and any(reference.get("hashes") for reference in references)


def main() -> int:
    """Write and check."""
    write()
    print(f"sbom: {check()} components in {SBOM.relative_to(ROOT)}, all that is locked with hashes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
