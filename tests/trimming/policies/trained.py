"""What policies have learned, drawn at random: as much as a trained one for everything but accuracy."""

import torch

from trimserve.model.trained_file import trainable
from trimserve.trimming.policies.exit import Router
from trimserve.trimming.trained import Shape, Trained

__all__ = ["drawn_modules"]


def drawn_modules(shape: Shape, seed: int = 0) -> dict[str, Trained]:
    """A module of every method, none of whose weights is 0; of `exit` only where layers can be left out.

    Args:
        shape: of the model, with the rows of compressors.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    modules = {}
    for name, kind in trainable().items():
        rows = 0 if kind is Router else shape.rows
        if kind is Router and shape.num_cross_layers < 2:
            continue
        module = kind(Shape(shape.width, shape.features_per_tile, shape.num_cross_layers, rows))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        modules[name] = module.requires_grad_(requires_grad=False)
    return modules
