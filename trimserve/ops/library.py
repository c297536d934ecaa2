"""Loads the compiled modules of this package and says what they are. It knows no op.

`_ops_cpu` registers the ops with torch and has no Python inside; `_host` is a Python module without torch.
"""

import importlib.util

import torch

__all__ = ["build_info", "load_library"]


def load_library() -> None:
    """Register the compiled ops with torch; a second call does nothing.

    Raises:
        ImportError: they are not built.
    """
    # Looked up by module name: in an editable install the file is not beside this one.
    spec = importlib.util.find_spec("trimserve.ops._ops_cpu")
    if spec is None or spec.origin is None:
        raise ImportError("trimserve.ops: the compiled ops are not built; run `make build`")
    torch.ops.load_library(spec.origin)


def build_info() -> dict[str, str | list[str] | None]:
    """Tell how the compiled modules were built.

    Returns:
        `version` of the package, `compiler`, `build_type`, `torch_target_version` (the oldest torch that can
        load them), `cuda_architectures` (empty: no CUDA kernels) and `git_sha` (None where it was not known).
    """
    from trimserve.ops import _host

    return _host.build_info()
