"""The playground from a clone: a server of the embedded model, and the page of an environment that has Gradio.

Usage: python scripts/playground.py PYTHON_OF_THE_PAGE
"""

import os
import subprocess
import sys
from pathlib import Path

from trimserve.process import ServerFailed, server_process

ROOT = Path(__file__).resolve().parents[1]


def main(python: str) -> int:
    """Serve until Ctrl-C, or until the page ends; its status."""
    is_interrupted = False
    try:
        with server_process("--http-port", "0") as server:
            command = [python, "-m", "trimserve", "playground", "--address", server.address]
            command += ["--http-address", str(server.http_address)]
            try:
                return subprocess.call(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
            except KeyboardInterrupt:
                is_interrupted = True
    except ServerFailed:
        if not is_interrupted:  # Ctrl-C ends the server, too, and before it is told to
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
