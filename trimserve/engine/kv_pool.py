"""Keys and values of the running sequences, and the account of their bytes.

Storage is taken in whole pages of `PAGE_POSITIONS` positions, so what is reported as held is what is
allocated. Text positions are reserved when a sequence is admitted (its prompt and its `max_new_tokens`),
cross-attention positions once selection has said how many features are kept. It knows nothing about requests.
"""

from torch import Tensor, device, dtype, empty

from trimserve.models.info import ModelInfo

__all__ = ["PAGE_POSITIONS", "KVPool", "SequenceKV", "whole_pages"]

PAGE_POSITIONS = 16
"""Positions of one page: allocation waste stays under 16 positions, page tables short."""


def whole_pages(num_positions: int) -> int:
    """Positions that `num_positions` take when rounded up to whole pages."""
    return -(-num_positions // PAGE_POSITIONS) * PAGE_POSITIONS


class KVPool:
    """Allocates the KV of sequences and knows how many bytes they hold."""

    def __init__(self, info: ModelInfo, kv_dtype: dtype, kv_device: device) -> None:
        """Start empty.

        Args:
            info: geometry.
            kv_dtype: of keys and values.
            kv_device: where they live.
        """
        self._info = info
        self._dtype = kv_dtype
        self._device = kv_device
        self._sequences: set[SequenceKV] = set()

    def allocate(self, max_positions: int) -> "SequenceKV":
        """Reserve the text positions of one sequence.

        Args:
            max_positions: prompt and generated tokens, at least 1.
        """
        sequence = SequenceKV(self, max_positions)
        self._sequences.add(sequence)
        return sequence

    def release(self, sequence: "SequenceKV") -> None:
        """Give a sequence's pages back; a second release does nothing."""
        self._sequences.discard(sequence)

    @property
    def used_self_bytes(self) -> int:
        """Bytes of self-attention KV, whole pages."""
        return sum(sequence.self_bytes for sequence in tuple(self._sequences))

    @property
    def used_cross_bytes(self) -> int:
        """Bytes of cross-attention KV, whole pages."""
        return sum(sequence.cross_bytes for sequence in tuple(self._sequences))

    def self_bytes(self, num_positions: int) -> int:
        """Bytes that `num_positions` text positions take over all self-attention layers, whole pages."""
        return whole_pages(num_positions) * self._info.self_kv_bytes_per_token

    def cross_bytes(self, num_features: int) -> int:
        """Bytes that `num_features` visual features take over all cross-attention layers, whole pages."""
        return whole_pages(num_features) * self._info.cross_kv_bytes_per_feature

    def new_self(self, num_positions: int) -> Tensor:
        """Unwritten pages of all self-attention layers: [layers, 2, whole pages, Hkv, Dh]."""
        return self._new(self._info.num_self_attention_layers, num_positions)

    def new_cross(self, num_features: int) -> Tensor:
        """Unwritten pages of all cross-attention layers: [layers, 2, whole pages, Hkv, Dh]."""
        return self._new(self._info.num_cross_attention_layers, num_features)

    def _new(self, num_layers: int, num_positions: int) -> Tensor:
        info = self._info
        shape = (num_layers, 2, whole_pages(num_positions), info.num_kv_heads, info.head_dim)
        return empty(shape, dtype=self._dtype, device=self._device)


class SequenceKV:
    """Self- and cross-attention KV of one sequence. Layers are counted among their own kind, from 0."""

    def __init__(self, pool: KVPool, max_positions: int) -> None:
        """Use `KVPool.allocate`."""
        self._pool = pool
        self._self_kv = pool.new_self(max_positions)
        self._cross_kv = pool.new_cross(0)
        self.length = 0
        """Text positions that every layer holds."""
        self.cross_length = 0
        """Visual features that every cross-attention layer holds."""
        self.cross_bias: Tensor | None = None
        """[cross_length], added to the logits of the features; None: nothing is."""

    @property
    def self_bytes(self) -> int:
        """Bytes of self-attention KV, whole pages."""
        return self._self_kv.numel() * self._self_kv.element_size()

    @property
    def cross_bytes(self) -> int:
        """Bytes of cross-attention KV, whole pages."""
        return self._cross_kv.numel() * self._cross_kv.element_size()

    def append_self(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new rows' keys and values of one layer, [T, Hkv, Dh], behind `length`.

        Returns:
            Keys and values of all positions up to the new end, [length + T, Hkv, Dh], views.
        """
        end = self.length + keys.shape[0]
        stored_keys, stored_values = self._self_kv[layer, 0], self._self_kv[layer, 1]
        stored_keys[self.length : end] = keys
        stored_values[self.length : end] = values
        return stored_keys[:end], stored_values[:end]

    def advance(self, num_positions: int) -> None:
        """Count rows that every layer has appended."""
        self.length += num_positions

    def reserve_cross(self, num_features: int, bias: Tensor | None) -> None:
        """Take the pages of the kept features, once, before the first `write_cross`."""
        self.cross_bias = bias
        self._cross_kv = self._pool.new_cross(num_features)
        self.cross_length = num_features

    def write_cross(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one cross-attention layer's keys and values, [cross_length, Hkv, Dh]."""
        self._cross_kv[layer, 0, : self.cross_length] = keys
        self._cross_kv[layer, 1, : self.cross_length] = values

    def cross(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one cross-attention layer, [cross_length, Hkv, Dh], views."""
        return self._cross_kv[layer, 0, : self.cross_length], self._cross_kv[layer, 1, : self.cross_length]

    def release(self) -> None:
        """Give the pages back."""
        self._pool.release(self)
