"""Keys and values in pages: what the decoder reads and writes, for one sequence or for the rows of a batch.

A page holds 16 positions of one group of G layers, which divides the number of either kind (`layers_per_page`), so
that one pool serves both. Layers are counted among their own kind, from 0: layer l is slot l % G of group l // G, and
all layers of a group share a list of pages. A cross-attention layer may hold fewer rows than the one before it
(ADR-0008). It does not know who grants pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import gcd

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trimserve import ops
from trimserve.model.adapters import Adapter
from trimserve.model.rotary import Rotation
from trimserve.ops import PAGE_POSITIONS
from trimserve.ops.upload import upload, upload_ids

__all__ = [
    "BatchTables",
    "FeatureTables",
    "KeyValues",
    "PromptSlots",
    "Tables",
    "layers_per_page",
    "num_pages",
    "padded",
    "slots_at",
    "together",
]

Tables = NDArray[np.int32]
"""[groups, pages of each], ids of the pages of one sequence in the order of their positions."""


def layers_per_page(num_self_layers: int, num_cross_layers: int) -> int:
    """G, the layers of one page: the most that divide the numbers of self- and of cross-attention layers.

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


_EDITIONS = count()


@dataclass(slots=True, eq=False)
class KeyValues:
    """Where one sequence's keys and values lie. The model fills pages that were granted and reserves none itself."""

    pages: Tensor
    """[P, G, 2, Hkv, 16, row], shared with other sequences; 0 are keys, 1 values. The last page is no sequence's."""
    self_tables: Tables
    """Pages of the text, for every position that a step writes."""
    cross_tables: Tables
    """Pages of the visual features; before the prefill, for the most rows that trimming can leave."""
    cross_lengths: list[int]
    """Rows that each cross-attention layer holds, at most as many as the one before it; set by the prefill, which uses
    the first pages of each group. What lies behind them may be taken back."""
    cross_biases: list[NDArray[np.float32] | None]
    """For each cross-attention layer [rows], added to the logits of its rows; None if there is no bias."""
    adapter: Adapter | None = None
    """With which they are computed, all of them; None is the base model."""
    length: int = 0
    """Text positions that every self-attention layer holds."""
    edition: int = field(default_factory=lambda: next(_EDITIONS), init=False)
    """Number of these tables and of what lies in them, unique in the process. Decode steps remember tables by it."""

    @classmethod
    def empty(
        cls,
        pages: Tensor,
        self_tables: Tables,
        cross_tables: Tables,
        num_cross_layers: int,
        adapter: Adapter | None = None,
    ) -> "KeyValues":
        """Granted pages that hold nothing yet."""
        return cls(pages, self_tables, cross_tables, [0] * num_cross_layers, [None] * num_cross_layers, adapter)

    def branch(self, self_tables: Tables, cross_tables: Tables, num_positions: int) -> "KeyValues":
        """Another text that begins with the same positions, over the same features.

        Args:
            self_tables: begin with the pages of this text that are full at `num_positions`; into the next one the
                rest is copied.
            cross_tables: the same as here.
            num_positions: that both texts have.
        """
        full, rest = divmod(num_positions, PAGE_POSITIONS)
        if rest:
            device = self.pages.device
            copied, source = (
                upload_ids(tables[:, full].tolist(), device) for tables in (self_tables, self.self_tables)
            )
            self.pages[copied] = self.pages[source]
        lengths, biases = [*self.cross_lengths], [*self.cross_biases]
        return replace(
            self,
            self_tables=self_tables,
            cross_tables=cross_tables,
            cross_lengths=lengths,
            cross_biases=biases,
            length=num_positions,
        )

    def replace_tables(self, self_tables: Tables, cross_tables: Tables) -> None:
        """Own other pages from now on; what they hold is the owner's business."""
        self.self_tables, self.cross_tables = self_tables, cross_tables
        self.edition = next(_EDITIONS)

    def hold_features(self, layer: int, num_rows: int, bias: NDArray[np.float32] | None) -> None:
        """Note what a cross-attention layer holds.

        Args:
            layer: among its own kind.
            num_rows: from the first position on.
            bias: [num_rows]; None if there is none.
        Raises:
            ValueError: more rows than were granted pages.
        """
        granted = self.cross_tables.shape[1] * PAGE_POSITIONS
        if num_rows > granted:
            raise ValueError(f"cross_tables: must have room for {num_rows} rows, got pages for {granted}")
        self.cross_lengths[layer] = num_rows
        self.cross_biases[layer] = bias


@dataclass(frozen=True, slots=True)
class PromptSlots:
    """Where the rows of one prompt go, for every group of layers; they reach the device in one copy."""

    pages: Tensor
    """See `KeyValues.pages`."""
    text: Tensor
    """int64 [groups, R], of the prompt's text."""
    features: Tensor
    """int64 [groups, M], of as many visual features as there are pages for."""

    @classmethod
    def of(cls, kv: KeyValues, num_rows: int) -> "PromptSlots":
        """Look up the first R positions of the text, and all of the features, in a sequence's tables."""
        text = _first_slots(kv.self_tables, num_rows)
        features = _first_slots(kv.cross_tables, kv.cross_tables.shape[1] * PAGE_POSITIONS)
        both = upload(np.concatenate([text.ravel(), features.ravel()]), kv.pages.device)
        return cls(kv.pages, both[: text.size].view(text.shape), both[text.size :].view(features.shape))

    def write_text(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store a self-attention layer's keys and values, [R, Hkv, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        ops.write_kv(self.pages, slot, keys, values, self.text[group])

    def write_features(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store a cross-attention layer's keys and values, [rows, Hkv, Dh]."""
        ops.write_kv(self.pages, layer % self.pages.shape[1], keys, values, self.of_features(layer, len(keys)))

    def of_features(self, layer: int, num_rows: int) -> Tensor:
        """Where the first features of a cross-attention layer lie, int64 [num_rows]."""
        return self.features[layer // self.pages.shape[1], :num_rows]


@dataclass(frozen=True, slots=True)
class BatchTables:
    """Where the rows of a decode step lie in the self-attention layers; a sequence may have several rows."""

    pages: Tensor
    tables: Tensor
    """int32 [groups, R, most pages], of each row its sequence's."""
    lengths: Tensor
    """int32 [R], positions that each row attends to."""
    slots: Tensor
    """int64 [groups, R], where each row's own position lies."""

    def rotate_and_write(self, layer: int, heads: Tensor, rotation: Rotation) -> None:
        """Rotate queries and keys of all rows' heads, [R, H + 2 * Hkv, Dh], and store keys and values."""
        group, slot = divmod(layer, self.pages.shape[1])
        ops.rotate_write_kv(heads, rotation.cosines, rotation.sines, self.pages, slot, self.slots[group])

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries [R, H, Dh] over the positions up to each row's own -> [R, H, Dh]."""
        group, slot = divmod(layer, self.pages.shape[1])
        return ops.paged_attention(q, self.pages, slot, self.tables[group], self.lengths, scale)


@dataclass(frozen=True, slots=True)
class FeatureTables:
    """Where the features that the rows of a decode step see lie in the cross-attention layers; nothing is written.

    In each layer the first S rows see something, S being that layer's own.
    """

    tables: tuple[Tensor, ...]
    """For each layer int32 [S, most pages]."""
    lengths: tuple[Tensor, ...]
    """For each layer int32 [S], features to attend to."""
    biases: tuple[Tensor, ...]
    """For each layer float32 [S, most pages * 16], added to the logits; empty if no row has a bias."""

    @classmethod
    def of(cls, kvs: Sequence[KeyValues]) -> "FeatureTables":
        """The sequence of each row; all hold features, those that hold some in more layers first."""
        pages, by_layer = kvs[0].pages, [*zip(*(kv.cross_lengths for kv in kvs), strict=True)]
        most = num_pages(max(by_layer[0]))
        tables = upload(together([kv.cross_tables for kv in kvs], most), pages.device)
        has_bias = any(kv.cross_biases[0] is not None for kv in kvs)
        # Layers where every sequence holds as many rows hold the same rows.
        found: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        for layer, lengths in enumerate(by_layer):
            if lengths not in found:
                held = [length for length in lengths if length]
                bias = None
                if has_bias:
                    biases = padded([kv.cross_biases[layer] for kv in kvs[: len(held)]], most * PAGE_POSITIONS)
                    bias = upload(biases, pages.device)
                found[lengths] = upload(np.array(held, dtype=np.int32), pages.device), bias
        of_layers = [found[lengths] for lengths in by_layer]
        return cls(
            tuple(tables[layer // pages.shape[1], : len(held)] for layer, (held, _) in enumerate(of_layers)),
            tuple(held for held, _ in of_layers),
            tuple(bias for _, bias in of_layers if bias is not None),
        )

    def attend(self, pages: Tensor, layer: int, q: Tensor, scale: float) -> Tensor:
        """Queries [S, H, Dh] over what each of the layer's rows sees in the pool -> [S, H, Dh]."""
        bias = self.biases[layer] if self.biases else None
        return ops.paged_attention(
            q, pages, layer % pages.shape[1], self.tables[layer], self.lengths[layer], scale, bias
        )


def _first_slots(tables: Tables, num_positions: int) -> NDArray[np.int64]:
    """Where the first positions of one sequence lie, int64 [groups, num_positions]."""
    positions = np.arange(num_positions)
    ids = tables[:, positions // PAGE_POSITIONS].astype(np.int64)
    slots: NDArray[np.int64] = ids * PAGE_POSITIONS + positions % PAGE_POSITIONS
    return slots


def together(tables: Sequence[Tables], most: int) -> NDArray[np.int32]:
    """The first pages of each table, int32 [groups, R, most]; 0 where it has fewer."""
    joined = np.zeros((tables[0].shape[0], len(tables), most), dtype=np.int32)
    for row, table in enumerate(tables):
        used = min(table.shape[1], most)
        joined[:, row, :used] = table[:, :used]
    return joined


def padded(biases: Sequence[NDArray[np.float32] | None], size: int) -> NDArray[np.float32]:
    """Biases one below the other, float32 [R, size]; zeros where there is none, and behind one."""
    joined = np.zeros((len(biases), size), dtype=np.float32)
    for row, bias in enumerate(biases):
        if bias is not None:
            joined[row, : len(bias)] = bias
    return joined


def slots_at(tables: NDArray[np.int32], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where one position of each row's sequence lies, int64 [groups, R].

    Args:
        tables: see `together`.
        positions: [R].
    """
    ids = tables[:, np.arange(len(positions)), positions // PAGE_POSITIONS].astype(np.int64)
    slots: NDArray[np.int64] = ids * PAGE_POSITIONS + positions % PAGE_POSITIONS
    return slots
