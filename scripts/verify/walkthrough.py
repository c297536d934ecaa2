"""The way of docs/start.md from a clone to a dashboard, walked by its very commands, each step timed.

The metrics page must have every metric that the Grafana dashboard asks for, and the Node client must stream an answer.

Usage: python -m scripts.verify.walkthrough [--out FILE]
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import about
from benchmarks.report import write_json
from scripts.verify.clients import ANSWER
from trimserve.config import ServerConfig
from trimserve.process import read_page

ROOT = Path(__file__).resolve().parents[2]

HEADING = "## From a clone to a dashboard"
OUT = ROOT / "benchmarks/results/walkthrough.json"
DASHBOARD = ROOT / "docker/grafana/trimserve.json"

DEFAULTS = ServerConfig()
TIMEOUT_SECONDS = 1800.0
SERVING = "gRPC on"
"""What the server says when it takes requests."""
MARK = "<<end of step>>"


def main() -> None:
    """Walk, check and write down the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the times; default: %(default)s")
    out = parser.parse_args().out
    ports = dict(zip((DEFAULTS.port, DEFAULTS.metrics_port), free_ports(2), strict=True))
    steps: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, Shell(Path(folder), environment(ports)) as shell:
        for command in (f"git clone --quiet {ROOT} trimserve && cd trimserve", *commands()):
            seconds, said = shell.run(with_ports(command, ports))
            print(f"{seconds:7.1f} s  {command}")
            steps.append({"command": command.replace(str(ROOT), "."), "seconds": round(seconds, 1)})
        missing = asked_metrics() - shown_metrics(ports[DEFAULTS.metrics_port])
    if missing:
        raise SystemExit(f"the dashboard asks for {sorted(missing)}, which the metrics page does not have")
    if not ANSWER.fullmatch(said):
        raise SystemExit(f"expected an answer and its account, got {said!r}")
    write_json({"benchmark": "walkthrough", **about(os.cpu_count() or 1), "steps": steps}, out)
    print(f"walkthrough: from a clone to a page that the dashboard can read, and to {said.partition(chr(10))[0]!r}")


def commands() -> list[str]:
    """What docs/start.md tells to type, without the clone."""
    section = (ROOT / "docs/start.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    return re.findall(r"^\$ (.+?)(?:\s+#.*)?$", section, re.MULTILINE)


def with_ports(command: str, ports: dict[int, int]) -> str:
    """A command with the ports of this run."""
    for documented, port in ports.items():
        command = command.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{port}")
    return command


def environment(ports: dict[int, int]) -> dict[str, str]:
    """A new user's: of no virtual environment, with the ports of this run."""
    own = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    knobs = {"PORT": ports[DEFAULTS.port], "METRICS_PORT": ports[DEFAULTS.metrics_port]}
    return own | {f"TRIMSERVE__SERVER__{name}": str(port) for name, port in knobs.items()}


def free_ports(number: int) -> list[int]:
    """Of loopback, below those that systems give away, which others could get while the build goes on."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server((DEFAULTS.host, port)):
            ports.append(port)
    return ports[:number]


def asked_metrics() -> set[str]:
    """Names of the dashboard's expressions, as they are on a metrics page."""
    expressions = re.findall(r'"expr": (".+")', DASHBOARD.read_text())
    return {name for each in expressions for name in re.findall(r"\b(?:trimserve|grpc_server)_\w+", json.loads(each))}


def shown_metrics(port: int) -> set[str]:
    """Names of all samples of a metrics page."""
    page = read_page(f"http://{DEFAULTS.host}:{port}/metrics", timeout_seconds=30)
    families = text_string_to_metric_families(page.decode())
    return {sample.name for family in families for sample in family.samples}


class Shell:
    """A bash that is told one command after the other; what it still runs is ended with it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Begin in a folder."""
        self._log = folder / "errors.log"
        with self._log.open("w") as log:
            self._bash = subprocess.Popen(
                ["bash"],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._timer = threading.Timer(TIMEOUT_SECONDS, self._kill)

    def run(self, command: str) -> tuple[float, str]:
        """Seconds and standard output of a command; of one in the background, until the server serves.

        Raises:
            SystemExit: it failed, or the server ended.
        """
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        start, lines, status = time.monotonic(), [], None
        self._bash.stdin.write(f"{{ {command}\n}} < /dev/null\nprintf '\\n{MARK} %s\\n' $?\n")
        self._bash.stdin.flush()
        is_ready = not command.endswith("&")
        while status is None or not is_ready:
            line = self._bash.stdout.readline()
            if not line:
                break
            is_ready |= SERVING in line
            if line.startswith(MARK):
                status = int(line.rpartition(" ")[2])
            else:
                lines.append(line)
        said = "".join(lines)
        if status != 0:
            raise SystemExit(f"{command}: exit status {status}\n{said}{self._log.read_text()[-5000:]}")
        return time.monotonic() - start, said.rstrip("\n") + "\n"

    def __enter__(self) -> "Shell":
        """Begin to count the time that all may take."""
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, with the server."""
        self._timer.cancel()
        self._kill()
        self._bash.communicate()

    def _kill(self) -> None:
        os.killpg(self._bash.pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
