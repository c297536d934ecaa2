"""The text decoder over a ragged batch: flat rows of several sequences, no padding, semantics of Meta's model code.

One loop over the layers serves prefill, decode steps and a guide's look. What differs between them is how rows attend
and which rows see an image; each user hands in a `Pass` that does it. A row that sees no image passes a
cross-attention layer unchanged (both of its branches are zero there). In a prefill the trimming policy is asked after
a cross-attention layer, whose attention used all that was held before; later layers project, cache and attend to what
it keeps (ADR-0008). A pass can be interrupted after every layer, and on a CPU within one after every piece of a long
prompt (ADR-0005).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Protocol

import torch
from torch import Tensor

from trimserve.model.adapters import Adapter, RowAdapters
from trimserve.model.bucketed_decode import BucketedDecode, Capture
from trimserve.model.checkpoint import text_config
from trimserve.model.compiled_decode import CompiledDecode
from trimserve.model.decode_batch import DecodeBatch
from trimserve.model.decode_rows import BucketRows, DecodeRows, NewRows
from trimserve.model.decoder_layers import CrossLayer, RmsNorm, SelfLayer
from trimserve.model.interruptible import Interruptible, run_through
from trimserve.model.pieces import pieces
from trimserve.model.projection import projection_of
from trimserve.model.prompt_rows import LookingRows, PromptRows, SequenceRows
from trimserve.model.ranks import ALONE, Ranks, Shard
from trimserve.model.rotary import RotaryAngles, Rotation
from trimserve.model.step_buffers import StepBuffers, StepInputs
from trimserve.model.transformers_mllama import CrossLayerParts, MllamaForConditionalGeneration, decoder_parts
from trimserve.ops.upload import upload_ids
from trimserve.trimming.policies.policy import CrossAttentionView

__all__ = ["Pass", "RaggedDecoder", "SequenceRows"]


_MOST_BATCHES: Final = 4
"""Whose tables are kept."""


class Pass(Protocol):
    """What one pass does between the parts of its layers; `PromptRows` documents each step."""

    @property
    def rotation(self) -> Rotation:
        """Of all rows."""

    @property
    def adapters(self) -> RowAdapters | None:
        """Of all rows; None if all are the base model's."""

    def rotate(self, layer: SelfLayer, heads: Tensor, piece: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate a piece of the rows; a decode step stores its keys and values at once."""

    def store(self, layer: SelfLayer, k: Tensor, v: Tensor) -> None:
        """Store keys and values of the text that are not stored yet."""

    def attend(self, layer: SelfLayer, q: Tensor, piece: slice) -> Tensor:
        """Attend to the text with a piece of the rows."""

    def seeing(self, hidden: Tensor, layer: CrossLayer) -> tuple[Tensor, RowAdapters | None] | None:
        """The rows that see an image, and their adapters; None if none does."""

    @property
    def has_ended(self) -> bool:
        """Whether the pass goes no further than to the features it has read."""

    def read_features(self, layer: CrossLayer, q: Tensor) -> Iterable[None]:
        """Make keys and values of visual features; yields where there may be a pause."""

    def attend_features(self, layer: CrossLayer, q: Tensor, piece: slice) -> Tensor:
        """Attend to visual features with a piece of the rows that see an image."""

    def finish(
        self, layer: CrossLayer, hidden: Tensor, looked: Tensor, adapters: RowAdapters | None
    ) -> tuple[Tensor, ...]:
        """End a layer for a piece of the rows that see an image: what goes out, and what `after_layer` asks for."""

    def place(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Put the rows that see an image back."""

    def after_layer(self, layer: CrossLayer, hidden: Tensor, *added: Tensor) -> Iterable[None]:
        """Decide what later layers hold; yields where there may be a pause."""


class RaggedDecoder:
    """The decoder of one checkpoint, over a transformers model's weights."""

    def __init__(self, model: MllamaForConditionalGeneration, ranks: Ranks = ALONE) -> None:
        """Borrow the weights of a model that `weights.load_weights` has built.

        Args:
            model: the weights, of which each rank has its part.
            ranks: that share them.
        """
        self._ranks = ranks
        parts = decoder_parts(model)
        config = text_config(model.config)
        head_dim = config.hidden_size // config.num_attention_heads
        self._embed = parts.embed_tokens
        self._angles = RotaryAngles(parts.rotary)
        self._norm = RmsNorm(parts.norm)
        self._lm_head = projection_of(parts.lm_head)
        self._vocab_size = config.vocab_size
        self._layers: list[SelfLayer | CrossLayer] = []
        num_self = num_cross = 0
        for layer in parts.layers:
            if isinstance(layer, CrossLayerParts):
                self._layers.append(CrossLayer(layer, num_cross, head_dim, ranks))
                num_cross += 1
            else:
                self._layers.append(SelfLayer(layer, num_self, head_dim, ranks))
                num_self += 1
        # The op that runs all layers at once cannot stop for sums between them.
        self._compiled = CompiledDecode.of(self._layers) if ranks.shard.size == 1 else None
        self._batches: list[DecodeBatch] = []

    def prefill(
        self, token_ids: Tensor, prompts: Sequence[SequenceRows], *, all_rows: bool = False
    ) -> Interruptible[Tensor]:
        """Run whole prompts through all layers and store their keys and values; yields after each layer.

        Args:
            token_ids: int64 [R], the prompts one after another.
            prompts: whose `num_rows` sum to R.
            all_rows: logits of every row instead of each prompt's last.
        Returns:
            float32 logits [B, vocab_size], or [R, vocab_size].
        """
        rows = PromptRows(prompts, self._rotation(prompts), self._ranks)
        hidden = yield from self._run(self._embedded(token_ids, rows.adapters), rows)
        for prompt in prompts:
            if prompt.kv is not None:
                prompt.kv.length = prompt.num_rows
        if all_rows:
            return self._logits(hidden, rows.adapters)
        ends = accumulate(prompt.num_rows for prompt in prompts)
        last = upload_ids([end - 1 for end in ends], hidden.device)
        of_prompts = RowAdapters.of([prompt.adapter for prompt in prompts], hidden.device)
        return self._logits(hidden[last], of_prompts)

    def look(self, token_ids: Tensor, prompt: SequenceRows) -> Interruptible[CrossAttentionView]:
        """Run a prompt up to the first cross-attention layer; yields after each layer.

        Args:
            token_ids: int64 [T].
            prompt: with at least one image, and without pages.
        Returns:
            What that layer computes from the images.
        """
        rows = LookingRows(prompt, self._rotation([prompt]), self._ranks)
        yield from self._run(self._embedded(token_ids, rows.adapters), rows)
        assert rows.view is not None, "an Mllama has cross-attention layers"
        return rows.view

    def embed(self, token_ids: Tensor) -> Tensor:
        """The base model's embedding, int64 [R] -> [R, D]."""
        embedded: Tensor = self._embed(token_ids)
        return embedded

    def decode(self, token_ids: Tensor, new: NewRows) -> Tensor:
        """Run new rows through all layers and store their keys and values, in pages that were granted.

        Args:
            token_ids: int64 [R].
            new: the rows.
        Returns:
            float32 logits [R, vocab_size].
        """
        batch = self._batch_of(new)
        positions = batch.positions(new)
        text = batch.text(new.kvs[0].pages, positions)
        rotation = self._angles.at(positions)
        hidden = self._embedded(batch.ordered(token_ids), batch.adapters)
        if self._compiled is not None and batch.adapters is None and len(positions) <= self._compiled.most_rows:
            self._compiled(hidden, rotation, text, batch.features)
        else:
            hidden = run_through(self._run(hidden, DecodeRows(rotation, text, batch.features, batch.adapters)))
        return batch.as_given(self._logits(hidden, batch.adapters))

    def bucketed(self, buffers: StepBuffers, capture: Capture) -> BucketedDecode:
        """`decode` in buffers that stay where they are, captured for every size of batch."""
        self._angles.reserve(buffers.max_positions)
        return BucketedDecode(self._step, buffers, capture)

    def _step(self, inputs: StepInputs) -> Tensor:
        rows = BucketRows(self._angles.of(inputs.positions), inputs.text, inputs.features, None)
        return self._logits(run_through(self._run(self._embed(inputs.token_ids), rows)), None)

    def _run(self, hidden: Tensor, rows: Pass) -> Interruptible[Tensor]:
        """The loop over layers, [R, D] -> [R, D]; yields after each, and within one after each piece of many rows."""
        for layer in self._layers:
            if isinstance(layer, SelfLayer):
                hidden = yield from _through_text(layer, hidden, rows)
            elif (those := rows.seeing(hidden, layer)) is not None:
                seen = yield from _through_features(layer, *those, rows)
                if seen is None:
                    return hidden
                hidden = rows.place(hidden, seen)
            yield
        return hidden

    def forget_adapter(self, adapter: Adapter) -> None:
        """Hold nothing of an adapter any more."""
        self._batches = [each for each in self._batches if each.adapters is None or adapter not in each.adapters]

    def _batch_of(self, new: NewRows) -> DecodeBatch:
        """Steps with drafts come between those without, so some more than the last one are kept."""
        batch = next((each for each in self._batches if each.is_of(new)), None) or DecodeBatch(new)
        self._batches = [batch, *(each for each in self._batches if each is not batch)][:_MOST_BATCHES]
        return batch

    def _rotation(self, prompts: Sequence[SequenceRows]) -> Rotation:
        return self._angles.at([row for prompt in prompts for row in range(prompt.num_rows)])

    def _embedded(self, token_ids: Tensor, adapters: RowAdapters | None) -> Tensor:
        embedded: Tensor = self._embed(token_ids)
        if adapters is not None:
            adapters.change_embedded(embedded, token_ids, self._embed)
        return embedded

    def _logits(self, hidden: Tensor, adapters: RowAdapters | None) -> Tensor:
        product = self._lm_head(self._norm(hidden), adapters)
        parts = self._ranks.gather(product)
        if len(parts) > 1:
            product = torch.cat([*self._new_columns(parts)], dim=1)
        return product.float()

    def _new_columns(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of each rank's part of the logits what the ranks before it do not have; see `Shard.equal`."""
        num_known = 0
        for rank, part in enumerate(parts):
            end = Shard(rank, len(parts)).equal(self._vocab_size).stop
            yield part[:, part.shape[1] - (end - num_known) :]
            num_known = end


def _through_text(layer: SelfLayer, hidden: Tensor, rows: Pass) -> Interruptible[Tensor]:
    """One self-attention layer, [R, D] -> [R, D]."""

    def project(piece: slice) -> tuple[Tensor, ...]:
        return rows.rotate(layer, layer.project(hidden[piece], _part(rows.adapters, piece)), piece)

    def finish(piece: slice) -> tuple[Tensor, ...]:
        attended = rows.attend(layer, q, piece)
        return (layer.finish(hidden[piece], attended, _part(rows.adapters, piece)),)

    q, k, v = yield from _in_pieces(project, hidden)
    rows.store(layer, k, v)
    (hidden,) = yield from _in_pieces(finish, hidden)
    return hidden


def _through_features(
    layer: CrossLayer, seeing: Tensor, adapters: RowAdapters | None, rows: Pass
) -> Interruptible[Tensor | None]:
    """One cross-attention layer for the rows that see an image, [S, D] -> [S, D]; None ends the pass."""

    def query(piece: slice) -> tuple[Tensor, ...]:
        return (layer.queries(seeing[piece], _part(adapters, piece)),)

    def finish(piece: slice) -> tuple[Tensor, ...]:
        looked = rows.attend_features(layer, q, piece)
        return rows.finish(layer, seeing[piece], looked, _part(adapters, piece))

    (q,) = yield from _in_pieces(query, seeing)
    yield from rows.read_features(layer, q)
    if rows.has_ended:
        return None
    seen, *added = yield from _in_pieces(finish, seeing)
    yield from rows.after_layer(layer, seeing, *added)
    return seen


def _in_pieces(work: Callable[[slice], tuple[Tensor, ...]], of: Tensor) -> Interruptible[tuple[Tensor, ...]]:
    """What comes of all rows, piece by piece with pauses between them."""
    parts: list[tuple[Tensor, ...]] = []
    for piece in pieces(len(of), of.device):
        if parts:
            yield
        parts.append(work(piece))
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _part(adapters: RowAdapters | None, piece: slice) -> RowAdapters | None:
    return None if adapters is None else adapters.part(piece.start, piece.stop)
