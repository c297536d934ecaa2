"""Notes, while an image is encoded, what policies want to know of the vision layers."""

from math import isqrt

import torch
from torch import Tensor

from trimserve.trimming.encoded_image import Observation

__all__ = ["VisionObserver", "patch_entropy"]

_BINS = 32


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
        self._patch_entropy: list[Tensor] = []
        self._class_rows = range(0, num_tiles * features_per_tile, features_per_tile)
        self._num_real = num_tiles * features_per_tile
        self._observed_layer = max(0, num_local_layers - 2)
        self._class_attention: list[Tensor] = []
        self._vision_attention: list[Tensor] = []
        self._vision_states: list[Tensor] = []
        self._layer = 0

    def sees(self, pixel_values: Tensor) -> None:
        """See the pixels of the real tiles, [tiles, 3, size, size]."""
        if "patch_entropy" in self._needs:
            self._patch_entropy = list(patch_entropy(pixel_values, isqrt(self._class_rows.step - 1)).unbind())

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

    def passes(self, entering: Tensor, leaving: Tensor) -> None:
        """See what a layer, whose attention was seen, makes of its rows: [R, width] each, the real rows first."""
        if "vision_states" in self._needs and self._layer == self._observed_layer:
            self._vision_states = [rows[: self._num_real] for rows in (entering, leaving)]
        self._layer += 1

    def observed(self) -> dict[Observation, Tensor]:
        """What was asked for, when all layers are through."""
        notes: dict[Observation, list[Tensor]] = {
            "class_attention": self._class_attention,
            "vision_attention": self._vision_attention,
            "vision_states": self._vision_states,
            "patch_entropy": self._patch_entropy,
        }
        return {name: torch.stack(notes[name]) for name in notes if name in self._needs}


def patch_entropy(pixel_values: Tensor, patches_per_side: int) -> Tensor:
    """How much the grey values of each patch vary.

    Args:
        pixel_values: [tiles, 3, size, size].
        patches_per_side: of a tile.
    Returns:
        float32 [tiles * features_per_tile], in nats: entropy of the histogram of the patch's grey values, the mean of
        the channels, over 32 equal bins between the image's least and largest; of a class token 0.
    """
    grey = pixel_values.float().mean(dim=1)
    tiles, side = len(grey), grey.shape[1] // patches_per_side
    low, high = grey.aminmax()
    bins = ((grey - low) / (high - low).clamp(min=torch.finfo(grey.dtype).tiny) * _BINS).long().clamp(0, _BINS - 1)
    patches = bins.view(tiles, patches_per_side, side, patches_per_side, side).transpose(2, 3).flatten(3).flatten(1, 2)
    counts = torch.zeros(*patches.shape[:2], _BINS, device=grey.device)
    counts.scatter_add_(2, patches, torch.ones_like(patches, dtype=counts.dtype))
    entropy = torch.special.entr(counts / side**2).sum(dim=2)
    return torch.cat([entropy.new_zeros(tiles, 1), entropy], dim=1).flatten()
