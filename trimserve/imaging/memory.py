"""Memory that two processes share, as a file without a name (memfd): not limited as `/dev/shm` is in containers."""

import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np

from trimserve.imaging.decode import Pixels

__all__ = ["kept_memory", "new_memory", "received_pixels", "write_memory"]

_NEVER_SHRINKS = fcntl.F_SEAL_SHRINK
"""Reading a mapped file that was cut short would end the process that reads."""
_KEPT_BYTES = 16 * 2**20
"""What a memory file may hold and be kept for the next image: to get its pages anew takes long beside decoding."""


def new_memory() -> int:
    """Descriptor of an empty memory file that can grow but never shrink, to be closed by the caller."""
    memory = os.memfd_create("trimserve-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _NEVER_SHRINKS)
    return memory


def write_memory(memory: int, contents: Iterable[bytes | memoryview]) -> None:
    """Write the contents one after the other, from the start; what the file had beyond them stays.

    Raises:
        MemoryError: there is no room for them.
        BaseException: what iterating raises.
    """
    place = 0
    for content in contents:
        num_bytes = memoryview(content).nbytes
        if os.pwrite(memory, content, place) != num_bytes:
            raise MemoryError("no room for an image in memory")
        place += num_bytes


def kept_memory(memory: int) -> int:
    """A memory file to write the next image to: this one, or a new one in its place if it has grown large."""
    if os.fstat(memory).st_size <= _KEPT_BYTES:
        return memory
    os.close(memory)
    return new_memory()


def received_pixels(memory: int, shape: tuple[int, int, int]) -> Pixels:
    """The array in a memory file that a process sent, mapped and not copied; closes the descriptor.

    Raises:
        ValueError: the file is smaller than the array, or could become so.
    """
    try:
        if not _never_shrinks(memory):
            raise ValueError("memory of pixels must be sealed")
        num_bytes, size = int(np.prod(shape)), os.fstat(memory).st_size
        if min(shape) < 1 or num_bytes > size:
            raise ValueError(f"memory of {shape} pixels must have as many bytes, got {size}")
        # All pages at once: every one of them is read, and to meet them one by one takes longer.
        mapped = mmap.mmap(memory, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    finally:
        os.close(memory)
    return np.frombuffer(mapped, np.uint8).reshape(shape)


def _never_shrinks(memory: int) -> bool:
    try:
        return bool(fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _NEVER_SHRINKS)
    except OSError:  # no memory file at all
        return False
