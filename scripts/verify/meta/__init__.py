"""What `scripts/verify/meta/__main__.py` compares: trimserve with Meta's own code, which `make verify-meta` installs.

Meta's image transform needs torchvision, and transformers imports it where it is there; `load_torchvision` comes first.
"""

import importlib

import torch

__all__ = ["load_torchvision"]

_DECLARED: list[torch.library.Library] = []
"""What a library declares is gone when it is."""


def load_torchvision() -> None:
    """Import torchvision beside a torch for the CPU, too.

    PyPI's is built for CUDA and brings such a torch no operators; without two of them it does not load. What is used of
    it, functions on Pillow images, is Python.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _DECLARED.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
