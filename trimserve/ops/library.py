"""Loads the compiled modules of this package and tells how they were built. It knows no op.

`_ops_cpu` and `_ops_cuda` register the ops with torch and contain no Python; `_host` is a Python module without torch
(ADR-0010).
"""

import importlib.util

import torch

__all__ = ["build_info", "has_cuda_ops", "load_library"]


def load_library() -> None:
    """Register the compiled ops with torch; a second call does nothing.

    The ops for CUDA tensors are registered if they are built and there is a GPU.

    Raises:
        ImportError: the ops are not built.
    """
    cpu, cuda = _module_file("_ops_cpu"), _module_file("_ops_cuda")
    if cpu is None:
        raise ImportError("trimserve.ops: the compiled ops are not built; run `make build`")
    torch.ops.load_library(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.ops.load_library(cuda)


def has_cuda_ops() -> bool:
    """Whether the ops are also built for CUDA tensors."""
    return _module_file("_ops_cuda") is not None


def _module_file(name: str) -> str | None:
    # Looked up by module name: in an editable install the file is not beside this one.
    spec = importlib.util.find_spec(f"trimserve.ops.{name}")
    return None if spec is None else spec.origin


def build_info() -> dict[str, str | list[str] | None]:
    """Tell how the compiled modules were built.

    Returns:
        `version` of the package, `compiler`, `build_type`, `torch_target_version` (the oldest torch that can
        load them), `cuda_architectures` (such as `90-real`; empty without CUDA kernels) and `git_sha` (None if the
        build knew no commit).
    """
    from trimserve.ops import _host

    return _host.build_info()
