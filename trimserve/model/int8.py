"""Weight-only int8: each output of a linear layer is stored as int8 numbers and one float32 scale.

The largest magnitude of a row becomes 127, so that a row can be quantized without the others.
"""

import torch
from torch import Tensor

__all__ = ["to_int8"]

_LARGEST = 127


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize weights, [R, columns] of any float dtype.

    Returns:
        int8 [R, columns] and scales float32 [R], whose product differs from the weights by at most half a scale.
        Weights that are not finite give scales that are not.
    """
    exact = rows.float()
    scales = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (exact / scales[:, None]).round().to(torch.int8), scales
