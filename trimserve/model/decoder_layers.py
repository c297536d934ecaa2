"""The layers of the text decoder, over flat rows of several sequences; what they mean is said in `decoder.py`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve import ops
from trimserve.model.key_values import BatchTables, FeatureTables, KeyValues, row_slots, write_rows
from trimserve.model.linear import Linear, linear
from trimserve.model.prefilled import TrimTimes
from trimserve.model.transformers_mllama import CrossLayerParts, NormParts, SelfLayerParts
from trimserve.model.visibility import feature_visibility
from trimserve.model.vision_rows import VisionRows
from trimserve.trimming.plan import select, select_again
from trimserve.trimming.policies.policy import FirstLayer

__all__ = ["BatchRows", "CrossLayer", "RmsNorm", "SelfLayer", "SequenceRows"]


@dataclass(slots=True)
class SequenceRows:
    """One sequence's prompt in a ragged batch."""

    num_rows: int
    kv: KeyValues | None
    """Empty before the prefill; None: nothing is stored, and no cross-attention layer passed."""
    vision: VisionRows | None = None

    @property
    def has_left(self) -> bool:
        """Whether its rows see no image in the layers to come, after they did."""
        return self.vision is not None and self.vision.has_left

    def visible_runs(self) -> list[tuple[int, int, int, int]]:
        """(first row, end row, first feature, end feature) of consecutive rows that see the same features."""
        if self.vision is None or self.has_left:
            return []
        offsets = self.vision.offsets
        images = self.vision.visible_images
        starts = [row for row in range(self.num_rows) if row == 0 or images[row] != images[row - 1]]
        runs = []
        for start, end in zip(starts, [*starts[1:], self.num_rows], strict=True):
            first, last = images[start]
            if first < last:
                runs.append((start, end, offsets[first], offsets[last]))
        return runs


@dataclass(frozen=True, slots=True)
class BatchRows:
    """What every layer needs to know of one forward pass."""

    cosines: Tensor
    """float32 [R, Dh / 2]"""
    sines: Tensor
    seeing: Tensor | None = None
    """int64 [S], in a prefill the flat rows that see an image; None: every row does."""
    num_seeing: tuple[int, ...] = ()
    """How many of those each sequence has."""

    def seen_by(self, prompts: Sequence[SequenceRows]) -> "BatchRows":
        """The same rows, which are those of the prompts, with what these see in the layers to come."""
        seeing: list[int] = []
        num_seeing = []
        start = 0
        for prompt in prompts:
            rows = [start + row for first, end, _, _ in prompt.visible_runs() for row in range(first, end)]
            seeing += rows
            num_seeing.append(len(rows))
            start += prompt.num_rows
        index = torch.tensor(seeing, dtype=torch.int64, device=self.cosines.device) if len(seeing) < start else None
        return replace(self, seeing=index, num_seeing=tuple(num_seeing))


class RmsNorm:
    """A norm of a checkpoint."""

    def __init__(self, norm: NormParts) -> None:
        """Borrow the norm's weight."""
        self.weight = norm.weight.data
        self.epsilon = norm.epsilon

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., K] -> the same shape."""
        return ops.rms_norm(rows, self.weight, self.epsilon)


Part = Linear | RmsNorm


class _Layer:
    """What self- and cross-attention layers share: the shape of heads, attention and the MLP."""

    def __init__(self, layer: SelfLayerParts | CrossLayerParts, index: int, head_dim: int) -> None:
        self._index = index
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._input_norm = RmsNorm(layer.input_norm)
        self._mlp_norm = RmsNorm(layer.mlp_norm)
        self._gate_up = linear(*layer.gate_up)
        self._down = linear(layer.down)

    def _mlp(self, hidden: Tensor) -> Tensor:
        return self._down(ops.silu_gate(self._gate_up(self._mlp_norm(hidden))))

    def _heads(self, rows: Tensor) -> Tensor:
        """[R, heads * Dh] -> [R, heads, Dh]."""
        return rows.view(rows.shape[0], -1, self._head_dim)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, bias: Tensor | None = None
    ) -> Tensor:
        """[T, H, Dh] over [L, Hkv, Dh] -> [T, H * Dh]; `bias` [L] is added to every row's logits."""
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=None if bias is None else bias.expand(1, 1, len(q), -1),
            is_causal=is_causal,
            scale=self._scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended[0].transpose(0, 1).flatten(1)


class SelfLayer(_Layer):
    """A self-attention layer."""

    def __init__(self, layer: SelfLayerParts, index: int, head_dim: int) -> None:
        """Borrow the weights of transformers' layer, the `index`-th of its kind."""
        super().__init__(layer, index, head_dim)
        self._qkv = linear(*layer.qkv)
        self._split = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        self._output = linear(layer.output)

    def prefill(self, hidden: Tensor, batch: BatchRows, prompts: Sequence[SequenceRows]) -> Tensor:
        """Whole prompts, [R, D] -> [R, D]; their keys and values are stored."""
        q, k, v = self._project(hidden, batch)
        rows = [prompt.num_rows for prompt in prompts]
        attended = []
        for prompt, *of_prompt in zip(prompts, q.split(rows), k.split(rows), v.split(rows), strict=True):
            queries, keys, values = of_prompt
            if prompt.kv is not None:
                write_rows(prompt.kv.pages, prompt.kv.self_tables, self._index, keys, values)
            attended.append(self._attend(queries, keys, values, is_causal=prompt.num_rows > 1))
        return self._finish(hidden, torch.cat(attended))

    def decode(self, hidden: Tensor, batch: BatchRows, text: BatchTables) -> Tensor:
        """One new row of each sequence, [B, D] -> [B, D]; its keys and values are stored."""
        q, k, v = self._project(hidden, batch)
        text.write(self._index, k, v)
        return self._finish(hidden, text.attend(self._index, q, self._scale).flatten(1))

    @property
    def decode_parts(self) -> list[Part]:
        """What decoding multiplies with, in the order of `ops.decode_layers`."""
        return [self._input_norm, self._qkv, self._output, self._mlp_norm, self._gate_up, self._down]

    def _project(self, hidden: Tensor, batch: BatchRows) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._heads(self._qkv(self._input_norm(hidden)))
        q, k, v = heads.split(self._split, dim=1)
        ops.rotate(heads[:, : -v.shape[1]], batch.cosines, batch.sines)
        return q, k, v

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self._output(attended)
        return hidden + self._mlp(hidden)


class CrossLayer(_Layer):
    """A cross-attention layer; the first one trims, and later ones where the policy says so."""

    def __init__(self, layer: CrossLayerParts, index: int, head_dim: int) -> None:
        """Borrow the weights of transformers' layer, the `index`-th of its kind."""
        super().__init__(layer, index, head_dim)
        self._attention_gate = layer.attention_gate.tanh().item()
        self._mlp_gate = layer.mlp_gate.tanh().item()
        self._query = linear(layer.query)
        self._kv = linear(*layer.kv)
        self._output = linear(layer.output)
        self._q_norm = RmsNorm(layer.q_norm)
        self._k_norm = RmsNorm(layer.k_norm)

    def prefill(self, hidden: Tensor, batch: BatchRows, prompts: Sequence[SequenceRows]) -> Tensor:
        """Whole prompts, [R, D] -> [R, D]; their keys and values are stored."""
        if not any(batch.num_seeing):
            return hidden
        residual, q = self._queries(hidden, batch.seeing)
        attended = [
            self._attend_prompt(rows, prompt.kv, prompt.vision, prompt.visible_runs())
            for rows, prompt in zip(q.split(batch.num_seeing), prompts, strict=True)
            if prompt.vision is not None and prompt.kv is not None and len(rows)
        ]
        added = self._output(torch.cat(attended))
        for prompt, *of_prompt in zip(prompts, *(x.split(batch.num_seeing) for x in (residual, added)), strict=True):
            rows, added_rows = of_prompt
            if prompt.vision is not None and prompt.kv is not None and len(rows):
                self._leave(rows, added_rows, prompt.kv, prompt.vision)
        return self._finish(hidden, residual, added, batch.seeing)

    def look(self, hidden: Tensor, batch: BatchRows, vision: VisionRows) -> FirstLayer:
        """What one prompt, [T, D], has to do with its images; nothing is stored."""
        _, q = self._queries(hidden, batch.seeing)
        keys, _ = self._project(vision.features)
        return self._seen(q, keys, vision.features, vision.num_features, vision)

    def decode(self, hidden: Tensor, features: FeatureTables) -> Tensor:
        """One new row of each sequence, [B, D] -> [B, D]; the first ones see something."""
        num_seeing = len(features.lengths[self._index])
        if not num_seeing:
            return hidden
        seeing = slice(num_seeing) if num_seeing < len(hidden) else None
        residual, q = self._queries(hidden, seeing)
        added = self._output(features.attend(self._index, q, self._scale).flatten(1))
        return self._finish(hidden, residual, added, seeing)

    @property
    def decode_parts(self) -> list[Part]:
        """What decoding multiplies with, in the order of `ops.decode_layers`."""
        query: list[Part] = [self._input_norm, self._query, self._q_norm]
        return [*query, self._output, self._mlp_norm, self._gate_up, self._down]

    @property
    def gates(self) -> list[float]:
        """Factors of what attention and MLP add."""
        return [self._attention_gate, self._mlp_gate]

    def _queries(self, hidden: Tensor, seeing: Tensor | slice | None) -> tuple[Tensor, Tensor]:
        """The rows that see something, and their queries [S, H, Dh]."""
        residual = hidden if seeing is None else hidden[seeing]
        return residual, self._q_norm(self._heads(self._query(self._input_norm(residual))))

    def _finish(self, hidden: Tensor, residual: Tensor, added: Tensor, seeing: Tensor | slice | None) -> Tensor:
        residual = residual.add(added, alpha=self._attention_gate)
        residual = residual.add(self._mlp(residual), alpha=self._mlp_gate)
        if seeing is None:
            return residual
        hidden[seeing] = residual
        return hidden

    def _leave(self, residual: Tensor, added: Tensor, kv: KeyValues, vision: VisionRows) -> None:
        """Where the policy says so, a prompt's rows [S, D] see nothing in later layers, and these hold nothing."""
        exit_rule = vision.trim.exit_rule
        if exit_rule is not None and exit_rule(residual, self._attention_gate * added):
            vision.has_left = True
            kv.shrink_cross(self._index + 1, 0, None)

    def _attend_prompt(
        self, q: Tensor, kv: KeyValues, vision: VisionRows, runs: Sequence[tuple[int, int, int, int]]
    ) -> Tensor:
        """Queries [S, H, Dh] of the rows that see something -> [S, H * Dh]; also selects and stores."""
        keys, values = self._project(vision.features)
        bias = vision.bias
        pieces = q.split([end_row - first_row for first_row, end_row, _, _ in runs])
        attended = torch.cat(
            [
                self._attend(piece, keys[first:end], values[first:end], bias=None if bias is None else bias[first:end])
                for piece, (_, _, first, end) in zip(pieces, runs, strict=True)
            ]
        )
        self._store(q, keys, values, kv, vision)
        return attended

    def _project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (self._heads(part) for part in self._kv(features).chunk(2, dim=-1))
        return self._k_norm(keys), values

    def _store(self, q: Tensor, keys: Tensor, values: Tensor, kv: KeyValues, vision: VisionRows) -> None:
        """Trim where the policy does; cache what the last row, and so every decoded row, sees."""
        if self._index == 0 and vision.trim.is_after_first_layer:
            self._trim(q, keys, values, kv, vision)
        elif self._index > 0 and vision.trim.is_cascade:
            self._trim_again(q, keys, values, kv, vision)
        else:
            first, end = vision.held_range
            if self._index == 0:
                kv.reserve_cross(end - first, vision.held_bias)
            write_rows(kv.pages, kv.cross_tables, self._index, keys[first:end], values[first:end])
        vision.layer_rows.append(vision.num_features)

    def _trim(self, q: Tensor, keys: Tensor, values: Tensor, kv: KeyValues, vision: VisionRows) -> None:
        """Select in the first cross-attention layer and cache; `vision` holds the kept features afterwards."""
        began_at = time.monotonic()
        selection = select(self._seen(q, keys, vision.features, vision.num_features, vision), vision.trim)
        selected_at = time.monotonic()
        kept, merged = vision.hold(selection)
        first, end = vision.held_range
        kv.reserve_cross(end - first, vision.held_bias)
        slots = row_slots(kv.pages, kv.cross_tables, 0, end - first)
        is_held = (first <= kept) & (kept < end)
        ops.gather_kv(kv.pages, 0, keys, values, selection.kept[is_held], slots[kept[is_held] - first])
        if selection.groups is not None:
            is_held = (first <= merged) & (merged < end)
            mean_keys, mean_values = (selection.groups.mean(rows)[is_held] for rows in (keys, values))
            ops.write_kv(kv.pages, 0, mean_keys, mean_values, slots[merged[is_held] - first])
        vision.trim_times = TrimTimes(began_at, selected_at, time.monotonic())

    def _trim_again(self, q: Tensor, keys: Tensor, values: Tensor, kv: KeyValues, vision: VisionRows) -> None:
        """Select among the features that were kept until here; `vision` holds fewer afterwards."""
        began_at = time.monotonic()
        places = vision.kept_places
        layer = self._seen(q, keys[places], vision.features[places], vision.num_kept, vision)
        selection = select_again(layer, vision.trim)
        selected_at = time.monotonic()
        rows = vision.hold_fewer(selection)
        first, end = vision.held_range
        kv.shrink_cross(self._index, end - first, vision.held_bias)
        slots = row_slots(kv.pages, kv.cross_tables, self._index, end - first)
        ops.gather_kv(kv.pages, self._index % kv.pages.shape[1], keys, values, rows[first:end], slots)
        vision.later_trim_times.append(TrimTimes(began_at, selected_at, time.monotonic()))

    def _seen(
        self, q: Tensor, keys: Tensor, features: Tensor, num_features: Sequence[int], vision: VisionRows
    ) -> FirstLayer:
        seeing = [images for images in vision.visible_images if images[0] < images[1]]
        visibility = feature_visibility(seeing, num_features).to(q.device)
        size, wants_picks = vision.features_per_tile, vision.trim.request.return_selection
        return FirstLayer(q, keys, features, visibility, self._scale, num_features, size, wants_picks)
