"""About this machine: what a figure was taken on, and with what."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trimserve.evaluation.report import about_this_run

__all__ = ["about", "peak_rss_bytes"]


def about(num_threads: int) -> dict[str, Any]:
    """Machine, versions and commit.

    Args:
        num_threads: of one op, in every process that was measured.
    """
    run = about_this_run(1, 0)
    machine = {**run["machine"], "num_threads": num_threads}
    if torch.get_default_device().type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {**run["versions"], "grpcio": metadata.version("grpcio")}
    return {"machine": machine, "versions": versions, "commit": run["commit"]}


def peak_rss_bytes(pid: int) -> int | None:
    """Most resident memory that a process has had so far; None where the system does not tell (not Linux)."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None
