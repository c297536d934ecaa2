"""About this machine: what a figure was taken on, and with what."""

import re
from pathlib import Path
from typing import Any

import torch

from trimserve.evaluation.report import about_this_run

__all__ = ["about", "memory_bytes"]


def about(num_threads: int) -> dict[str, Any]:
    """Machine, versions and commit.

    Args:
        num_threads: of one op, in every process that was measured.
    """
    run = about_this_run(1, 0)
    machine = {**run["machine"], "num_threads": num_threads}
    if torch.get_default_device().type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {"machine": machine, "versions": run["versions"], "commit": run["commit"]}


def memory_bytes(pid: int, field: str = "VmHWM") -> int | None:
    """Resident memory of a process, the most so far or (`VmRSS`) now; None where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None
