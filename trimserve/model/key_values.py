"""Keys and values in pages: what the decoder reads and writes, one sequence at a time or a batch of them.

A page holds 16 positions of one group of G layers, which divides the number of either kind (`layers_per_page`), so
that one pool serves both. Layers are counted among their own kind, from 0: layer l is slot l % G of group l // G, and
all layers of a group share a list of pages. A cross-attention layer may hold fewer rows than the one before it
(ADR-0008). Who allocates pages is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve import ops
from trimserve.ops import PAGE_POSITIONS

__all__ = [
    "BatchTables",
    "FeatureTables",
    "KeyValues",
    "Tables",
    "layers_per_page",
    "num_pages",
    "padded",
    "row_slots",
    "slots_at",
    "together",
    "write_rows",
]

Tables = NDArray[np.int32]
"""[groups, pages of each], ids of the pages of one sequence in the order of their positions."""


def layers_per_page(num_self_layers: int, num_cross_layers: int, wanted: int | None = None) -> int:
    """G, the layers of one page.

    Args:
        num_self_layers: self-attention layers.
        num_cross_layers: cross-attention layers.
        wanted: None takes the most that both kinds can have.
    Raises:
        ValueError: `wanted` does not divide that.

    >>> layers_per_page(32, 8)
    8
    """
    most = gcd(num_self_layers, num_cross_layers)
    if wanted is None:
        return most
    if most % wanted:
        layers = f"{num_self_layers} self- and {num_cross_layers} cross-attention layers"
        raise ValueError(f"must divide {most}, the greatest common divisor of {layers} of the model, got {wanted}")
    return wanted


def num_pages(num_positions: int) -> int:
    """Pages that `num_positions` take in each group.

    >>> num_pages(17)
    2
    """
    return -(-num_positions // PAGE_POSITIONS)


class KeyValues:
    """Where one sequence's keys and values lie, and how many there are."""

    def __init__(self, pages: Tensor, self_tables: Tables, cross_tables: Tables, num_cross_layers: int) -> None:
        """Hold nothing yet.

        Args:
            pages: [P, G, 2, Hkv, 16, Dh], shared with other sequences; 0 are keys, 1 values. The last page is no
                sequence's.
            self_tables: pages of the text, with room for prompt and answer.
            cross_tables: pages of the visual features, with room for as many as may be held.
            num_cross_layers: cross-attention layers.
        """
        self.pages = pages
        self.self_tables = self_tables
        self.cross_tables = cross_tables
        self.length = 0
        """Text positions that every self-attention layer holds."""
        self.cross_lengths = [0] * num_cross_layers
        """Rows that each cross-attention layer holds, at most as many as the one before it."""
        self.cross_biases: list[NDArray[np.float32] | None] = [None] * num_cross_layers
        """Of each cross-attention layer [rows], added to the logits of its rows; None if there is no bias."""

    def reserve_cross(self, num_rows: int, bias: Tensor | None) -> None:
        """Note the rows that decoding sees; `bias` [num_rows] is added to their logits."""
        self.shrink_cross(0, num_rows, bias)

    def shrink_cross(self, layer: int, num_rows: int, bias: Tensor | None) -> None:
        """Let cross-attention layers from `layer` on hold no more than `num_rows`, with another bias."""
        num_layers = len(self.cross_lengths) - layer
        self.cross_lengths[layer:] = [num_rows] * num_layers
        self.cross_biases[layer:] = [None if bias is None else bias.float().cpu().numpy()] * num_layers


def row_slots(pages: Tensor, tables: Tables, layer: int, num_rows: int) -> Tensor:
    """Where a sequence's first positions lie in the pages of a layer, int64 [num_rows]; see `write_rows`."""
    positions = np.arange(num_rows)
    table = tables[layer // pages.shape[1]]
    slots = table[positions // PAGE_POSITIONS].astype(np.int64) * PAGE_POSITIONS + positions % PAGE_POSITIONS
    return torch.from_numpy(slots).to(pages.device)


def write_rows(pages: Tensor, tables: Tables, layer: int, keys: Tensor, values: Tensor) -> None:
    """Store one layer's keys and values of a sequence from its first position on.

    Args:
        pages: see `KeyValues.pages`.
        tables: of the sequence, for layers of this kind.
        layer: among its own kind.
        keys: [R, Hkv, Dh].
        values: [R, Hkv, Dh].
    """
    ops.write_kv(pages, layer % pages.shape[1], keys, values, row_slots(pages, tables, layer, len(keys)))


@dataclass(frozen=True, slots=True)
class BatchTables:
    """Page tables of the self-attention layers for a batch of sequences that each have one new row."""

    pages: Tensor
    tables: Tensor
    """int32 [groups, B, most pages]"""
    lengths: Tensor
    """int32 [B], positions to attend to."""
    slots: Tensor
    """int64 [groups, B], where each sequence's last position lies."""

    host_tables: NDArray[np.int32] | None = None
    """`tables` where looking something up waits for nothing; None where nothing is."""

    @classmethod
    def of_text(cls, kvs: Sequence[KeyValues]) -> "BatchTables":
        """The new row is the position behind `length`."""
        most = max(kv.self_tables.shape[1] for kv in kvs)
        tables, pages = together([kv.self_tables for kv in kvs], most), kvs[0].pages
        lengths, slots = _lengths_and_slots(tables, [kv.length + 1 for kv in kvs], pages.device)
        return cls(pages, torch.from_numpy(tables).to(pages.device), lengths, slots, tables)

    def at(self, lengths: Sequence[int]) -> "BatchTables":
        """Of the same sequences when they have other lengths, [B]."""
        assert self.host_tables is not None
        found, slots = _lengths_and_slots(self.host_tables, lengths, self.pages.device)
        return BatchTables(self.pages, self.tables, found, slots, self.host_tables)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new row of each sequence, [B, Hkv, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        ops.write_kv(self.pages, slot, keys, values, self.slots[group])

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries [B, H, Dh] over what each sequence holds -> [B, H, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        return ops.paged_attention(q, self.pages, slot, self.tables[group], self.lengths, scale)


@dataclass(frozen=True, slots=True)
class FeatureTables:
    """Page tables of the cross-attention layers for a batch of sequences; nothing is written there.

    In each layer the first S sequences hold rows, S being that layer's own.
    """

    pages: Tensor
    tables: tuple[Tensor, ...]
    """Of each layer int32 [S, most pages]."""
    lengths: tuple[Tensor, ...]
    """Of each layer int32 [S], rows to attend to."""
    biases: tuple[Tensor, ...]
    """Of each layer float32 [S, most pages * 16], added to the logits; empty: nothing is."""

    @classmethod
    def of(cls, kvs: Sequence[KeyValues]) -> "FeatureTables":
        """Of sequences that hold rows, those that hold some in more layers first."""
        pages, by_layer = kvs[0].pages, [*zip(*(kv.cross_lengths for kv in kvs), strict=True)]
        most = num_pages(max(by_layer[0]))
        tables = torch.from_numpy(together([kv.cross_tables for kv in kvs], most)).to(pages.device)
        has_bias = any(kv.cross_biases[0] is not None for kv in kvs)
        # Layers where every sequence holds as many rows hold the same rows.
        found: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        for layer, lengths in enumerate(by_layer):
            if lengths not in found:
                held = [length for length in lengths if length]
                bias = None
                if has_bias:
                    biases = padded([kv.cross_biases[layer] for kv in kvs[: len(held)]], most * PAGE_POSITIONS)
                    bias = torch.from_numpy(biases).to(pages.device)
                found[lengths] = torch.tensor(held, dtype=torch.int32, device=pages.device), bias
        of_layers = [found[lengths] for lengths in by_layer]
        return cls(
            pages,
            tuple(tables[layer // pages.shape[1], : len(held)] for layer, (held, _) in enumerate(of_layers)),
            tuple(held for held, _ in of_layers),
            tuple(bias for _, bias in of_layers if bias is not None),
        )

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries [S, H, Dh] over what each of the layer's sequences holds -> [S, H, Dh]."""
        bias = self.biases[layer] if self.biases else None
        slot = layer % self.pages.shape[1]
        return ops.paged_attention(q, self.pages, slot, self.tables[layer], self.lengths[layer], scale, bias)


def together(tables: Sequence[Tables], most: int) -> NDArray[np.int32]:
    """The first pages of each sequence, int32 [groups, B, most]; 0 where it has fewer."""
    joined = np.zeros((tables[0].shape[0], len(tables), most), dtype=np.int32)
    for row, table in enumerate(tables):
        used = min(table.shape[1], most)
        joined[:, row, :used] = table[:, :used]
    return joined


def padded(biases: Sequence[NDArray[np.float32] | None], size: int) -> NDArray[np.float32]:
    """Biases one below the other, float32 [B, size]; zeros where there is none, and behind one."""
    joined = np.zeros((len(biases), size), dtype=np.float32)
    for row, bias in enumerate(biases):
        if bias is not None:
            joined[row, : len(bias)] = bias
    return joined


def slots_at(tables: NDArray[np.int32], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where one position of each sequence lies, int64 [groups, B].

    Args:
        tables: see `together`.
        positions: [B].
    """
    ids = tables[:, np.arange(len(positions)), positions // PAGE_POSITIONS].astype(np.int64)
    slots: NDArray[np.int64] = ids * PAGE_POSITIONS + positions % PAGE_POSITIONS
    return slots


def _lengths_and_slots(
    tables: NDArray[np.int32], lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    known = np.array(lengths, dtype=np.int64)
    slots = slots_at(tables, known - 1)
    return torch.from_numpy(known.astype(np.int32)).to(device), torch.from_numpy(slots).to(device)
