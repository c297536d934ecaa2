"""LoRA adapters beside the base model's weights, and which of them the rows of a batch have.

Nothing is merged: rows of several adapters and of the base model pass a linear layer together, and each adapter's rows
are changed afterwards. `adapter_files.py` reads them; names of adapters and requests are not known here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Adapter", "Change", "RowAdapters"]


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter makes of one linear layer, or of the token embedding; all of it in the model's dtype."""

    down: Tensor | None = None
    """[rank, columns]; of the embedding [rank, tokens]. None if there is no LoRA."""
    up: Tensor | None = None
    """[outputs, rank], times the adapter's scale."""
    weight: Tensor | None = None
    """In place of the layer's weight; None keeps it."""
    added: Tensor | None = None
    """[outputs], added to each row; None if there is nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.down, self.up, self.weight, self.added)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def applied(self, rows: Tensor, outputs: Tensor, bias: Tensor | None) -> Tensor:
        """What becomes of a linear layer's outputs [R, outputs], with the rows [R, columns] that it read."""
        if self.weight is not None:
            outputs = F.linear(rows, self.weight, bias)
        if self.down is not None and self.up is not None:
            outputs = outputs + F.linear(F.linear(rows, self.down), self.up)
        return outputs if self.added is None else outputs + self.added

    def embedded(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """What becomes of the embeddings [R, D] of token ids [R]."""
        if self.weight is not None:
            embedded = F.embedding(token_ids, self.weight)
        if self.down is not None and self.up is not None:
            embedded = embedded + F.linear(self.down[:, token_ids].T, self.up)
        return embedded


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, on the model's device; two are the same only if they are one object."""

    changes: Mapping[nn.Module, Change]
    """By the layer of the base model."""
    modules: tuple[str, ...]
    """Kinds of layers that it changes, such as `self_attn.q_proj`, in alphabetical order."""
    rank: int
    """The largest of its ranks; 0 without LoRA."""
    image_key: bytes
    """Tells visual features that it changes from all others; empty if it leaves them as the base model's."""
    kv_key: bytes
    """The same of the keys and values that cross-attention layers make of visual features."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(change.nbytes for change in self.changes.values())


class RowAdapters:
    """The adapters of some rows, at least one of which has one."""

    def __init__(self, adapters: Sequence[Adapter | None], device: torch.device) -> None:
        """Use `of` or `alike`."""
        self._adapters = adapters
        self._device = device
        self._groups: list[tuple[Adapter, Tensor | None]] = []
        """Each adapter with the indices of its rows, int64 ascending; None if all rows are its own."""
        self._parts: dict[tuple[int, int], RowAdapters | None] = {}
        for adapter in dict.fromkeys(adapters):
            if adapter is not None:
                rows = [row for row, each in enumerate(adapters) if each is adapter]
                index = None if len(rows) == len(adapters) else torch.tensor(rows, device=device)
                self._groups.append((adapter, index))

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], device: torch.device) -> "RowAdapters | None":
        """Of rows whose adapters are given one by one.

        Args:
            adapters: [R], None for a row of the base model.
            device: of the rows.
        Returns:
            None if all rows are the base model's.
        """
        return cls(adapters, device) if any(adapter is not None for adapter in adapters) else None

    @classmethod
    def alike(cls, adapter: Adapter | None) -> "RowAdapters | None":
        """Of any number of rows with one adapter; None for the base model."""
        return None if adapter is None else cls([adapter], torch.device("cpu"))

    def __contains__(self, adapter: Adapter) -> bool:
        """Whether any of the rows has the adapter."""
        return any(each is adapter for each in self._adapters)

    def part(self, first: int, end: int) -> "RowAdapters | None":
        """Of some of the rows; made once, since every layer and every step of a batch asks for the same."""
        if (first, end) == (0, len(self._adapters)):
            return self
        if (first, end) not in self._parts:
            self._parts[first, end] = RowAdapters.of(self._adapters[first:end], self._device)
        return self._parts[first, end]

    def change(self, outputs: Tensor, rows: Tensor, linears: Sequence[nn.Linear]) -> None:
        """Change what linear layers made of the rows, in place.

        Args:
            outputs: [R, outputs of all layers], one layer's after another's.
            rows: [R, columns], what the layers read.
            linears: the layers.
        """
        parts = outputs.split([linear.out_features for linear in linears], dim=1)
        for adapter, index in self._groups:
            changes = [adapter.changes.get(linear) for linear in linears]
            if all(change is None for change in changes):
                continue
            own = rows if index is None else rows[index]
            for linear, part, change in zip(linears, parts, changes, strict=True):
                if change is not None:
                    before = part if index is None else part[index]
                    _put(part, index, change.applied(own, before, linear.bias))

    def change_embedded(self, embedded: Tensor, token_ids: Tensor, embedding: nn.Embedding) -> None:
        """The same of the token embedding.

        Args:
            embedded: [R, D].
            token_ids: int64 [R].
            embedding: the layer.
        """
        for adapter, index in self._groups:
            change = adapter.changes.get(embedding)
            if change is not None:
                ids, before = (token_ids, embedded) if index is None else (token_ids[index], embedded[index])
                _put(embedded, index, change.embedded(ids, before))


def _put(rows: Tensor, index: Tensor | None, changed: Tensor) -> None:
    if index is None:
        rows.copy_(changed)
    else:
        rows.index_copy_(0, index, changed)
