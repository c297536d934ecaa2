"""From numpy to the model's device, without waiting for what the device still computes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["upload", "upload_ids"]


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; a CPU's tensor shares its memory.

    Args:
        values: not changed afterwards.
        device: where to.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # a copy of pageable memory would be waited for


def upload_ids(ids: Sequence[int], device: torch.device) -> Tensor:
    """Copy numbers to a device, as int64 [len(ids)]."""
    return upload(np.array(ids, dtype=np.int64), device)
