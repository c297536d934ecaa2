"""What torch raises is told apart by what can go on after it."""

import pytest
import torch

from trimserve.executor.failures import is_device_error, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_is_recognised_and_leaves_the_device_usable(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_device_error(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_an_error_that_the_device_reports_for_ever_is_recognised(error: BaseException) -> None:
    assert is_device_error(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("CUDA error")])
def test_other_errors_are_neither(error: BaseException) -> None:
    assert not is_device_error(error)
    assert not is_out_of_memory(error)
