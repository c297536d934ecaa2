"""Keys and values in pages: what the decoder reads and writes, one sequence at a time or a batch of them.

A page holds 16 positions of one group of layers, G = gcd(self-attention layers, cross-attention layers) of them, so
that one pool serves both kinds. Layers are counted among their own kind, from 0: layer l is slot l % G of group l // G,
and all layers of a group share a list of pages. Who allocates pages is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimserve import ops
from trimserve.ops import PAGE_POSITIONS

__all__ = [
    "BatchTables",
    "KeyValues",
    "Tables",
    "layers_per_page",
    "num_pages",
    "row_slots",
    "slots_at",
    "together",
    "write_rows",
]

Tables = NDArray[np.int32]
"""[groups, pages of each], ids of the pages of one sequence in the order of their positions."""


def layers_per_page(num_self_layers: int, num_cross_layers: int) -> int:
    """G, the layers of one page.

    >>> layers_per_page(32, 8)
    8
    """
    return gcd(num_self_layers, num_cross_layers)


def num_pages(num_positions: int) -> int:
    """Pages that `num_positions` take in each group.

    >>> num_pages(17)
    2
    """
    return -(-num_positions // PAGE_POSITIONS)


class KeyValues(Protocol):
    """Where one sequence's keys and values lie (`engine/kv_pool.py`)."""

    length: int
    """Text positions that every self-attention layer holds."""
    cross_length: int
    """Rows that every cross-attention layer holds."""
    cross_bias: NDArray[np.float32] | None
    """[cross_length], added to the logits of the rows; None: nothing is."""

    @property
    def pages(self) -> Tensor:
        """[P, G, 2, Hkv, 16, Dh], shared with other sequences; 0 are keys, 1 values. The last page is no sequence's."""

    @property
    def self_tables(self) -> Tables:
        """Pages of the text, with room for prompt and answer."""

    @property
    def cross_tables(self) -> Tables:
        """Pages of the visual features."""

    def reserve_cross(self, num_rows: int, bias: Tensor | None) -> None:
        """Take pages for the rows that decoding sees; `bias` [num_rows] is added to their logits."""


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
    """Page tables of one kind of layer for a batch of sequences that each have one new row."""

    pages: Tensor
    tables: Tensor
    """int32 [groups, B, most pages]"""
    lengths: Tensor
    """int32 [B], positions to attend to."""
    slots: Tensor
    """int64 [groups, B], where each sequence's last position lies; [0, B] where nothing is written."""
    bias: Tensor | None
    """float32 [B, most pages * 16], added to the logits; None: nothing is."""

    host_tables: NDArray[np.int32] | None = None
    """`tables` where looking something up waits for nothing; None where nothing is."""

    @classmethod
    def of_text(cls, kvs: Sequence[KeyValues]) -> "BatchTables":
        """Of self-attention: the new row is the position behind `length`."""
        most = max(kv.self_tables.shape[1] for kv in kvs)
        tables = together([kv.self_tables for kv in kvs], most)
        return cls._make(kvs[0].pages, tables, [kv.length + 1 for kv in kvs], None)

    @classmethod
    def of_features(cls, kvs: Sequence[KeyValues]) -> "BatchTables":
        """Of cross-attention, where nothing is written; every sequence holds at least one row."""
        lengths = [kv.cross_length for kv in kvs]
        most = num_pages(max(lengths))
        tables = together([kv.cross_tables for kv in kvs], most)
        biases = {row: kv.cross_bias for row, kv in enumerate(kvs) if kv.cross_bias is not None}
        bias = np.zeros((len(kvs), most * PAGE_POSITIONS), dtype=np.float32) if biases else None
        for row, of_row in biases.items():
            assert bias is not None
            bias[row, : len(of_row)] = of_row
        return cls._make(kvs[0].pages, tables, lengths, bias)

    @classmethod
    def _make(
        cls, pages: Tensor, tables: NDArray[np.int32], lengths: Sequence[int], bias: NDArray[np.float32] | None
    ) -> "BatchTables":
        device = pages.device
        return cls(
            pages,
            torch.from_numpy(tables).to(device),
            *_lengths_and_slots(tables, lengths, device),
            None if bias is None else torch.from_numpy(bias).to(device),
            tables,
        )

    def at(self, lengths: Sequence[int]) -> "BatchTables":
        """Of the same sequences when they have other lengths, [B]."""
        assert self.host_tables is not None
        found, slots = _lengths_and_slots(self.host_tables, lengths, self.pages.device)
        return BatchTables(self.pages, self.tables, found, slots, self.bias, self.host_tables)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new row of each sequence, [B, Hkv, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        ops.write_kv(self.pages, slot, keys, values, self.slots[group])

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries [B, H, Dh] over what each sequence holds -> [B, H, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        return ops.paged_attention(q, self.pages, slot, self.tables[group], self.lengths, scale, self.bias)


def together(tables: Sequence[Tables], most: int) -> NDArray[np.int32]:
    """The first pages of each sequence, int32 [groups, B, most]; 0 where it has fewer."""
    joined = np.zeros((tables[0].shape[0], len(tables), most), dtype=np.int32)
    for row, table in enumerate(tables):
        used = min(table.shape[1], most)
        joined[:, row, :used] = table[:, :used]
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
