"""What `scripts/verify_meta.py` compares: trimserve with Meta's own code, which `make verify-meta` installs.

Meta's image transform needs torchvision, and transformers imports it where it is there; `load_torchvision` comes first.
"""

import importlib

import torch

__all__ = ["load_torchvision"]

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what it declares is gone when it is


def load_torchvision() -> None:
    """Import torchvision beside a torch for the CPU, too.

    PyPI's is built for CUDA and brings such a torch no operators; without two of them it does not load. What is used of
    it, functions on Pillow images, is Python.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
