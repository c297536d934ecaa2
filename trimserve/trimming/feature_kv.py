"""Keys and values of one image's features in the cross-attention layers, kept for another question on the image.

They do not depend on the text. A question needs those of the features that it keeps, so a row is computed once a
question needs it. Who makes them, and how many bytes there are, is not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureKeyValues", "Project"]

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Features [R, hidden_size] -> keys and values [R, Hkv, Dh], each row's for itself."""


@dataclass(slots=True)
class _Rows:
    """Of one layer."""

    keys: Tensor
    """[N, Hkv, Dh]"""
    values: Tensor
    """[N, Hkv, Dh]"""
    is_known: Tensor
    """bool [N]"""
    num_known: int = 0

    def put(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Learn rows that were unknown, int64 [R]."""
        self.keys.index_copy_(0, places, keys)
        self.values.index_copy_(0, places, values)
        self.is_known.index_fill_(0, places, value=True)
        self.num_known += len(places)


class FeatureKeyValues:
    """What is known of one image, of the base model or of one adapter."""

    def __init__(self, num_features: int, num_layers: int) -> None:
        """Know nothing.

        Args:
            num_features: N, of the image.
            num_layers: cross-attention layers there is room for, from the first one on.
        """
        self._num_features = num_features
        self._layers: list[_Rows | None] = [None] * num_layers

    def serves(self, layer: int, wanted: Tensor | None) -> bool:
        """Whether `rows` may be asked.

        Products of other devices than a CPU depend on how many rows there are, so only all rows are the same there
        whoever asks.

        Args:
            layer: a cross-attention layer.
            wanted: as in `rows`.
        """
        return layer < len(self._layers) and (wanted is None or wanted.device.type == "cpu")

    def rows(self, layer: int, wanted: Tensor | None, features: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Keys and values of some of the image's features; nobody may change them.

        Args:
            layer: that this serves.
            wanted: int64 [R], features of the image, ascending; None is all of them.
            features: [R, hidden_size], these features.
            project: makes what is not known yet.
        Returns:
            [R, Hkv, Dh] each.
        """
        places = torch.arange(self._num_features, device=features.device) if wanted is None else wanted
        held = self._layers[layer]
        if held is None:
            keys, values = project(features)
            self._layers[layer] = held = self._room_for(keys)
            held.put(places, keys, values)
            return keys, values
        if held.num_known < self._num_features:
            is_missing = ~held.is_known[places]
            if is_missing.any():
                held.put(places[is_missing], *project(features[is_missing]))
        if wanted is None:
            return held.keys, held.values
        return held.keys.index_select(0, wanted), held.values.index_select(0, wanted)

    def _room_for(self, keys: Tensor) -> _Rows:
        shape = (self._num_features, *keys.shape[1:])
        is_known = torch.zeros(self._num_features, dtype=torch.bool, device=keys.device)
        return _Rows(keys.new_empty(shape), keys.new_empty(shape), is_known)
