"""The text decoder over a ragged batch: flat rows of several sequences, no padding, semantics of Meta's model code.

Text rows see images by the processor's rule; a row that sees none passes a cross-attention layer unchanged (both
of its branches are zero there). In a prefill with trimming, the first cross-attention layer attends to all valid
features, scores them and keeps some; the following layers project, cache and attend to those only, or to fewer yet
where the policy says so (ADR-0008). What was chosen before the decoder comes in as fewer features. A prefill can be
interrupted after every layer. Scoring and gathering are `ops`, choosing is `trimming.py`, where keys and values lie is
`key_values.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimserve.model.bucketed_decode import BucketedDecode, Capture
from trimserve.model.checkpoint import text_config
from trimserve.model.compiled_decode import CompiledDecode
from trimserve.model.decode_batch import DecodeBatch
from trimserve.model.decoder_layers import BatchRows, CrossLayer, RmsNorm, SelfLayer, SequenceRows
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import BatchTables, FeatureTables, KeyValues
from trimserve.model.linear import linear
from trimserve.model.rotary import RotaryAngles
from trimserve.model.step_buffers import StepBuffers, StepInputs
from trimserve.model.transformers_mllama import CrossLayerParts, MllamaForConditionalGeneration, decoder_parts
from trimserve.trimming.policies.policy import FirstLayer

__all__ = ["RaggedDecoder", "SequenceRows"]


class RaggedDecoder:
    """The decoder of one checkpoint, over a transformers model's weights."""

    def __init__(self, model: MllamaForConditionalGeneration) -> None:
        """Borrow the weights of a model that `weights.load_weights` has built."""
        parts = decoder_parts(model)
        config = text_config(model.config)
        head_dim = config.hidden_size // config.num_attention_heads
        self._embed = parts.embed_tokens
        self._angles = RotaryAngles(parts.rotary)
        self._norm = RmsNorm(parts.norm)
        self._lm_head = linear(parts.lm_head)
        self._layers: list[SelfLayer | CrossLayer] = []
        num_self = num_cross = 0
        for layer in parts.layers:
            if isinstance(layer, CrossLayerParts):
                self._layers.append(CrossLayer(layer, num_cross, head_dim))
                num_cross += 1
            else:
                self._layers.append(SelfLayer(layer, num_self, head_dim))
                num_self += 1
        self._compiled = CompiledDecode.of(self._layers)
        self._batch: DecodeBatch | None = None

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
        hidden, batch = self._begin(token_ids, prompts)
        for layer in self._layers:
            hidden = layer.prefill(hidden, batch, prompts)
            if isinstance(layer, CrossLayer) and any(prompt.has_left for prompt in prompts):
                batch = batch.seen_by(prompts)
            yield
        for prompt in prompts:
            if prompt.kv is not None:
                prompt.kv.length = prompt.num_rows
        if not all_rows:
            ends = torch.tensor([prompt.num_rows for prompt in prompts], device=hidden.device).cumsum(0)
            hidden = hidden[ends - 1]
        return self._logits(hidden)

    def first_layer(self, token_ids: Tensor, prompt: SequenceRows) -> Interruptible[FirstLayer]:
        """Run a prompt up to the first cross-attention layer; yields after each layer.

        Args:
            token_ids: int64 [T].
            prompt: with at least one image.
        Returns:
            What that layer knows of the images.
        """
        hidden, batch = self._begin(token_ids, [prompt])
        for layer in self._layers:
            if isinstance(layer, CrossLayer):
                assert prompt.vision is not None
                return layer.look(hidden, batch, prompt.vision)
            hidden = layer.prefill(hidden, batch, [prompt])
            yield
        raise AssertionError("an Mllama has cross-attention layers")

    def _begin(self, token_ids: Tensor, prompts: Sequence[SequenceRows]) -> tuple[Tensor, BatchRows]:
        """Embeddings [R, D], and what every layer needs to know."""
        hidden = self._embed(token_ids)
        positions = [row for prompt in prompts for row in range(prompt.num_rows)]
        return hidden, BatchRows(*self._angles.at(positions)).seen_by(prompts)

    def decode(self, token_ids: Tensor, kvs: Sequence[KeyValues]) -> Tensor:
        """Run one new row of each sequence through all layers and store its keys and values.

        Args:
            token_ids: int64 [B].
            kvs: [B], each one position longer afterwards.
        Returns:
            float32 logits [B, vocab_size].
        """
        batch = self._batch_of(kvs)
        lengths = batch.lengths(kvs)
        rows = BatchRows(*self._angles.at(lengths))
        hidden, text = self._embed(batch.ordered(token_ids)), batch.text(lengths)
        if self._compiled is not None and len(kvs) <= self._compiled.most_rows:
            self._compiled(hidden, rows, text, batch.features)
        else:
            hidden = self._decode_layers(hidden, rows, text, batch.features)
        for kv in kvs:
            kv.length += 1
        return batch.as_given(self._logits(hidden))

    def bucketed(self, buffers: StepBuffers, capture: Capture) -> BucketedDecode:
        """`decode` in buffers that stay where they are, captured for every size of batch."""
        self._angles.reserve(buffers.max_positions)
        return BucketedDecode(self._step, buffers, capture)

    def _step(self, inputs: StepInputs) -> Tensor:
        hidden = self._embed(inputs.token_ids)
        rows, sees = BatchRows(*self._angles.of(inputs.positions)), iter(inputs.sees)
        for layer in self._layers:
            if isinstance(layer, SelfLayer):
                hidden = layer.decode(hidden, rows, inputs.text)
            elif inputs.features is not None:
                hidden = torch.where(next(sees), layer.decode(hidden, inputs.features), hidden)
        return self._logits(hidden)

    def _batch_of(self, kvs: Sequence[KeyValues]) -> DecodeBatch:
        batch = self._batch
        if batch is None or not batch.is_of(kvs):
            self._batch = batch = DecodeBatch(kvs, self._forget_batch)
        return batch

    def _forget_batch(self) -> None:  # on the thread that let go of a sequence, at any time
        self._batch = None

    def _decode_layers(
        self, hidden: Tensor, rows: BatchRows, text: BatchTables, features: FeatureTables | None
    ) -> Tensor:
        for layer in self._layers:
            if isinstance(layer, SelfLayer):
                hidden = layer.decode(hidden, rows, text)
            elif features is not None:
                hidden = layer.decode(hidden, features)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._lm_head(self._norm(hidden)).float()
