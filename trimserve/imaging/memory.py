"""Memory that two processes share, as a file without a name (memfd): not limited as `/dev/shm` is in containers."""

import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np

from trimserve.imaging.decode import Pixels

__all__ = ["new_memory", "received_pixels"]

_OF_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Reading a mapped file that was cut short would end the process that reads."""


def new_memory(contents: Iterable[bytes | memoryview]) -> int:
    """Descriptor of a memory file with the contents one after the other, to be closed by the caller.

    Its size cannot change any more.

    Raises:
        MemoryError: there is no room for it.
        BaseException: what iterating raises.
    """
    memory = os.memfd_create("trimserve-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for content in contents:
            if os.write(memory, content) != memoryview(content).nbytes:
                raise MemoryError("no room for an image in memory")
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _OF_FIXED_SIZE)
    except BaseException:
        os.close(memory)
        raise
    return memory


def received_pixels(memory: int, shape: tuple[int, int, int]) -> Pixels:
    """The array in a memory file that a process sent, mapped and not copied; closes the descriptor.

    Raises:
        ValueError: the file is not of this size, or its size could still change.
    """
    try:
        if not _is_of_fixed_size(memory):
            raise ValueError("memory of pixels must be sealed")
        num_bytes = os.fstat(memory).st_size
        if min(shape) < 1 or num_bytes != int(np.prod(shape)):
            raise ValueError(f"memory of {shape} pixels must have as many bytes, got {num_bytes}")
        mapped = mmap.mmap(memory, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(memory)
    return np.frombuffer(mapped, np.uint8).reshape(shape)


def _is_of_fixed_size(memory: int) -> bool:
    try:
        return fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _OF_FIXED_SIZE == _OF_FIXED_SIZE
    except OSError:  # no memory file at all
        return False
