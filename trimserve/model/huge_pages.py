"""Memory for what every decode step reads, weights and pages of keys and values: on huge pages where there are some.

Reading gigabytes through pages of 4 KiB costs a core more walks through page tables than it remembers; huge pages spare
nearly all of them. Linux gives them to whoever asks (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise or always).
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty"]

_HUGE_BYTES = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on a CPU, its whole huge pages are asked for as such, the rest stays on small ones.

    Memory is taken when it is first written.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        device: where it lies.
    Raises:
        RuntimeError, torch.OutOfMemoryError: as `torch.empty`.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):  # torch says what is asked for in vain
        return torch.empty(shape, dtype=dtype, device=device)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_BYTES
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // _HUGE_BYTES * _HUGE_BYTES)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)
