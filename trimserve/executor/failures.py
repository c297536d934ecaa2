"""What torch raises, told apart: no memory left, which ends a request, and a broken device, which ends the engine."""

import torch

__all__ = ["is_device_error", "is_out_of_memory"]

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the text of errors that have no type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def is_device_error(error: BaseException) -> bool:
    """Whether a device failed. CUDA reports such an error again at every later call, so nothing can be tried anew."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
