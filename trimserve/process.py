"""A server in a process of its own, for demonstrations, tests and benchmarks."""

import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServerFailed", "ServerProcess", "read_page", "server_process"]


class ServerFailed(Exception):
    """A server failed to start or to end cleanly; the message contains the end of its log."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that accepts requests."""

    address: str
    """`HOST:PORT` of gRPC."""
    metrics_address: str
    """`HOST:PORT` of `/metrics`, `/healthz` and `/readyz`."""
    pid: int
    http_address: str | None = None
    """`HOST:PORT` of HTTP in OpenAI's shape; None if it is off."""

    def metrics(self) -> dict[str, float]:
        """The series of `/metrics`: value by name with labels."""
        lines = read_page(f"http://{self.metrics_address}/metrics").decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def read_page(url: str, timeout_seconds: float | None = None) -> bytes:
    """Fetch a page from a server on this machine, ignoring proxies of the environment.

    Args:
        url: of the page.
        timeout_seconds: of each network operation; None waits forever.
    Raises:
        OSError: it cannot be fetched; `urllib.error.HTTPError` for an HTTP error status.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=timeout_seconds) as page:
        content: bytes = page.read()
    return content


@contextmanager
def server_process(
    *options: str, log: Path | None = None, python: str | Path = sys.executable
) -> Iterator[ServerProcess]:
    """Run `trimserve serve` on free ports of loopback until the block ends, and let it drain.

    Args:
        *options: of the command.
        log: file that it logs to; None discards the log at the end.
        python: that runs it.
    Raises:
        OSError: `log` cannot be written.
        ServerFailed: it ended before it served, or with a status other than 0.
    """
    command = [str(python), "-m", "trimserve", "serve", "--port", "0", "--metrics-port", "0", *options]
    with (
        tempfile.TemporaryFile("w+") if log is None else log.open("w+") as written,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"gRPC on (\S+), metrics on ([^\s,]+)(?:, HTTP on (\S+))?", line)
            if found is not None:
                yield ServerProcess(found[1], found[2], process.pid, found[3])
        finally:
            process.terminate()
            process.communicate()
        if found is None or process.returncode:
            written.seek(0)
            why = f"ended with status {process.returncode}: {written.read()[-2000:]}"
            raise ServerFailed(f"{' '.join(command)} {why}")
