"""Notes, while an image is encoded, what policies want to know of the vision layers."""

import torch
from torch import Tensor

from trimserve.models.encoded_image import Observation

__all__ = ["VisionObserver"]


class VisionObserver:
    """Looks on at every layer's attention, and keeps what was asked for."""

    def __init__(
        self, needs: frozenset[Observation], num_tiles: int, features_per_tile: int, num_local_layers: int
    ) -> None:
        """Begin with an image.

        Args:
            needs: what is asked for.
            num_tiles: real tiles.
            features_per_tile: the class token and the patches.
            num_local_layers: vision layers before the global ones.
        """
        self._needs = needs
        self._class_rows = range(0, num_tiles * features_per_tile, features_per_tile)
        self._num_real = num_tiles * features_per_tile
        self._observed_layer = max(0, num_local_layers - 2)
        self._class_attention: list[Tensor] = []
        self._vision_attention: list[Tensor] = []
        self._layer = 0

    def attends(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        """See a layer's attention.

        Args:
            queries: [heads, R, Dh], the real rows first.
            keys: the same.
            scale: factor of the logits.
        """
        if "class_attention" in self._needs:
            logits = queries[:, self._class_rows].float() @ keys.float().transpose(1, 2) * scale
            self._class_attention.append(logits.softmax(dim=-1)[:, :, : self._num_real].mean(dim=(0, 1)))
        if "vision_attention" in self._needs and self._layer == self._observed_layer:
            self._vision_attention = [rows[:, : self._num_real].transpose(0, 1) for rows in (queries, keys)]
        self._layer += 1

    def observed(self) -> dict[Observation, Tensor]:
        """What was asked for, when all layers are through."""
        notes: dict[Observation, list[Tensor]] = {
            "class_attention": self._class_attention,
            "vision_attention": self._vision_attention,
        }
        return {name: torch.stack(notes[name]) for name in notes if name in self._needs}
