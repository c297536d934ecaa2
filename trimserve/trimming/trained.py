"""What is trained of a policy: a module, which `trimserve train-compressor` writes into a file. It knows no model."""

from dataclasses import dataclass

from torch import nn

__all__ = ["Shape", "Trained"]

_LEAST_INSIDE = 64
_INSIDE_SHARE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What a module is made for."""

    width: int
    """D, of a feature and of the decoder."""
    features_per_tile: int
    """F"""
    num_cross_layers: int
    """Cross-attention layers."""
    rows: int
    """Rows that a tile comes to, its class token included; 0 where rows are not what is trained."""


class Trained(nn.Module):
    """Weights of one method for one model."""

    def __init__(self, shape: Shape) -> None:
        """Draw the weights.

        Args:
            shape: of the model and of what comes out.
        Raises:
            ValueError: rows that the method cannot make; says which it can.
        """
        super().__init__()
        self.shape = shape

    @property
    def inside(self) -> int:
        """Width of what is computed inside: 64 for features of 192, 256 for those of 4096."""
        return max(_LEAST_INSIDE, self.shape.width // _INSIDE_SHARE)
