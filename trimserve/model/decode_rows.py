"""Rows of a decode step on their way through the decoder's layers: they attend to pages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from trimserve.model.adapters import RowAdapters
from trimserve.model.decoder_layers import CrossLayer, SelfLayer
from trimserve.model.key_values import BatchTables, FeatureTables, KeyValues
from trimserve.model.rotary import Rotation

__all__ = ["BucketRows", "DecodeRows", "NewRows"]


@dataclass(frozen=True, slots=True)
class NewRows:
    """The new rows of a step, those of a sequence next to each other."""

    kvs: Sequence[KeyValues]
    """The sequence of each of R rows."""
    positions: Sequence[int]
    """Where each row goes in its sequence's text."""

    @classmethod
    def of(cls, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None) -> "NewRows":
        """The rows behind what each sequence holds.

        Args:
            kvs: the sequences.
            num_rows: new rows of each, at least 1; None if each has one.
        """
        if num_rows is None:
            return cls(kvs, [kv.length for kv in kvs])
        counted = [*zip(kvs, num_rows, strict=True)]
        return cls(
            [kv for kv, count in counted for _ in range(count)],
            [kv.length + row for kv, count in counted for row in range(count)],
        )

    @property
    def editions(self) -> tuple[int, ...]:
        """`KeyValues.edition` of each row: steps with equal ones find the same tables."""
        return tuple([kv.edition for kv in self.kvs])

    def stored(self) -> None:
        """Count the rows among what their sequences hold."""
        for kv, position in zip(self.kvs, self.positions, strict=True):
            kv.length = position + 1


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that attend to pages; in each cross-attention layer the first ones see features."""

    rotation: Rotation
    text: BatchTables
    features: FeatureTables | None
    """None if no row sees an image."""
    adapters: RowAdapters | None
    """None if all rows are the base model's."""

    def rotate(
        self,
        layer: SelfLayer,
        heads: Tensor,
        piece: slice,  # noqa: ARG002 - a step is one
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PromptRows.rotate`; stores keys and values at once."""
        self.text.rotate_and_write(layer.index, heads, self.rotation)
        return layer.split(heads)

    def store(self, layer: SelfLayer, k: Tensor, v: Tensor) -> None:
        """They are stored already."""

    def attend(self, layer: SelfLayer, q: Tensor, piece: slice) -> Tensor:  # noqa: ARG002 - a step is one piece
        """See `PromptRows.attend`."""
        return self.text.attend(layer.index, q, layer.scale).flatten(1)

    def seeing(self, hidden: Tensor, layer: CrossLayer) -> tuple[Tensor, RowAdapters | None] | None:
        """See `PromptRows.seeing`."""
        num_seeing = 0 if self.features is None else len(self.features.lengths[layer.index])
        if not num_seeing:
            return None
        if num_seeing == len(hidden):
            return hidden, self.adapters
        return hidden[:num_seeing], None if self.adapters is None else self.adapters.part(0, num_seeing)

    @property
    def has_ended(self) -> bool:
        """Decoding goes through all layers."""
        return False

    def read_features(self, layer: CrossLayer, q: Tensor) -> Iterable[None]:  # noqa: ARG002 - they lie in pages
        """See `PromptRows.read_features`."""
        return ()

    def attend_features(self, layer: CrossLayer, q: Tensor, piece: slice) -> Tensor:  # noqa: ARG002 - a step is one
        """See `PromptRows.attend_features`."""
        assert self.features is not None
        return self.features.attend(self.text.pages, layer.index, q, layer.scale).flatten(1)

    def finish(
        self, layer: CrossLayer, hidden: Tensor, looked: Tensor, adapters: RowAdapters | None
    ) -> tuple[Tensor, ...]:
        """See `PromptRows.finish`."""
        return (layer.finish_step(hidden, looked, adapters, None),)

    def place(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """See `PromptRows.place`."""
        if len(seen) == len(hidden):
            return seen
        hidden[: len(seen)] = seen
        return hidden

    def after_layer(self, layer: CrossLayer, hidden: Tensor, *added: Tensor) -> Iterable[None]:
        """Decoding trims nothing."""
        del layer, hidden, added
        return ()


@dataclass(frozen=True, slots=True)
class BucketRows(DecodeRows):
    """Rows in fixed buffers: all take part in every layer, which changes none that sees nothing."""

    def seeing(
        self,
        hidden: Tensor,
        layer: CrossLayer,  # noqa: ARG002 - alike in all layers
    ) -> tuple[Tensor, RowAdapters | None] | None:
        """See `PromptRows.seeing`."""
        return None if self.features is None else (hidden, self.adapters)

    def finish(
        self, layer: CrossLayer, hidden: Tensor, looked: Tensor, adapters: RowAdapters | None
    ) -> tuple[Tensor, ...]:
        """See `PromptRows.finish`."""
        assert self.features is not None
        return (layer.finish_step(hidden, looked, adapters, self.features.lengths[layer.index]),)
