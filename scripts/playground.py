"""The playground from a clone: a server of the embedded model, and the page of an environment that has Gradio.

Usage: python scripts/playground.py PYTHON_OF_THE_PAGE
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trimserve.process import server_process

ROOT = Path(__file__).resolve().parents[1]


def main(python: str) -> int:
    """Serve until Ctrl-C, or until the page ends; its status."""
    with server_process("--http-port", "0") as server:
        command = [python, "-m", "trimserve", "playground", "--address", server.address]
        with suppress(KeyboardInterrupt):  # the page has it, too
            return subprocess.call(
                [*command, "--http-address", str(server.http_address)], env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
