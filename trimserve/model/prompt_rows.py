"""Whole prompts on their way through the decoder's layers: rows attend to what is computed in the same pass.

Here a prefill stores keys and values in pages that were granted, asks the trimming policy after a cross-attention
layer, and takes the times of that.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trimserve import ops
from trimserve.model.adapters import Adapter, RowAdapters
from trimserve.model.attention import attention, causal_attention
from trimserve.model.decoder_layers import CrossLayer, SelfLayer
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues, PromptSlots
from trimserve.model.kv_format import round_as_stored
from trimserve.model.prefilled import TrimTimes
from trimserve.model.ranks import Ranks
from trimserve.model.rotary import Rotation
from trimserve.model.visibility import feature_visibility
from trimserve.model.vision_rows import VisionRows
from trimserve.ops.upload import upload, upload_ids
from trimserve.trimming.policies.policy import CrossAttentionView, Verdict
from trimserve.trimming.selection import Selection

__all__ = ["LookingRows", "PromptRows", "SequenceRows"]


@dataclass(slots=True)
class SequenceRows:
    """One sequence's prompt in a ragged batch."""

    num_rows: int
    kv: KeyValues | None
    """Where to store keys and values; None stores none and goes no further than the first cross-attention layer."""
    vision: VisionRows | None = None

    @property
    def adapter(self) -> Adapter | None:
        """That of the keys and values; None, the base model, without them."""
        return None if self.kv is None else self.kv.adapter


@dataclass(slots=True)
class _Attended:
    """What one prompt attended to in a cross-attention layer."""

    vision: VisionRows
    kv: KeyValues
    slots: PromptSlots
    first_row: int
    """Of those that see an image."""
    queries: Tensor
    keys: Tensor
    values: Tensor
    log_sums: list[Tensor | None] = field(default_factory=list)
    """See `attention`; of each piece of the rows."""

    @property
    def all_log_sums(self) -> Tensor | None:
        """Of all rows."""
        known = [each for each in self.log_sums if each is not None]
        return torch.cat(known, dim=1) if known else None

    @property
    def end_row(self) -> int:
        """Behind the last one."""
        return self.first_row + len(self.queries)


class PromptRows:
    """The rows of several prompts, one prompt after another."""

    def __init__(self, prompts: Sequence[SequenceRows], rotation: Rotation, ranks: Ranks) -> None:
        """Begin a prefill: the prompts' `kv` hold nothing.

        Args:
            prompts: with R rows in all.
            rotation: of R rows at their positions.
            ranks: that share the model.
        """
        self.rotation = rotation
        self._ranks = ranks
        self._prompts = prompts
        self._num_rows = [prompt.num_rows for prompt in prompts]
        self.adapters = self._adapters_of(self._num_rows)
        """See `Pass.adapters`."""
        self.has_ended = False
        """See `Pass.has_ended`."""
        self._text: list[tuple[int, Tensor, Tensor]] = []
        """For each prompt, in the current layer, its first row, keys and values."""
        self._attended: list[_Attended] = []
        """For each prompt that sees an image, in the current layer."""
        self._slots = [None if prompt.kv is None else PromptSlots.of(prompt.kv, prompt.num_rows) for prompt in prompts]
        """Of each prompt; None if it stores nothing."""
        for kv in (prompt.kv for prompt in prompts if prompt.kv is not None):
            kv.cross_lengths[:] = [0] * len(kv.cross_lengths)
            kv.cross_biases[:] = [None] * len(kv.cross_biases)
        self._sees_less = False
        """Whether a prompt has left, so that fewer rows see an image in the next layer."""
        self._see()

    def rotate(self, layer: SelfLayer, heads: Tensor, piece: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate a piece of the rows, [rows of the piece, H + 2 * Hkv, Dh] -> queries, keys, values."""
        q, k, v = layer.split(heads)
        turned = self.rotation.part(piece)
        ops.rotate(heads[:, : -v.shape[1]], turned.cosines, turned.sines)
        return q, k, v

    def store(self, layer: SelfLayer, k: Tensor, v: Tensor) -> None:
        """Store keys and values [R, Hkv, Dh]."""
        self._text, start = [], 0
        for slots, keys, values in zip(self._slots, *(x.split(self._num_rows) for x in (k, v)), strict=True):
            if slots is not None:
                for rows in (keys, values):
                    round_as_stored(rows, slots.pages)
                slots.write_text(layer.index, keys, values)
            self._text.append((start, keys, values))
            start += len(keys)

    def attend(self, layer: SelfLayer, q: Tensor, piece: slice) -> Tensor:
        """Attend with a piece of the queries [R, H, Dh] -> [rows of the piece, H * Dh]."""
        attended = []
        for start, keys, values in self._text:
            first, end = max(piece.start, start), min(piece.stop, start + len(keys))
            if first < end:
                seen = slice(0, end - start)
                attended.append(causal_attention(q[first:end], keys[seen], values[seen], layer.scale))
        return torch.cat(attended)

    def seeing(
        self,
        hidden: Tensor,
        layer: CrossLayer,  # noqa: ARG002 - alike in all layers
    ) -> tuple[Tensor, RowAdapters | None] | None:
        """The rows of `hidden` [R, D] that see an image, [S, D], and their adapters; None if none does."""
        if self._sees_less:
            self._see()
        if not any(self._num_seeing):
            return None
        return (hidden, self.adapters) if self._index is None else (hidden[self._index], self._of_seeing)

    def read_features(self, layer: CrossLayer, q: Tensor) -> Iterable[None]:
        """Make keys and values of what the queries [S, H, Dh] see; yields after each image."""
        self._attended, start = [], 0
        of_prompts = zip(self._prompts, self._slots, q.split(self._num_seeing), strict=True)
        for prompt, slots, queries in of_prompts:
            if prompt.vision is not None and prompt.kv is not None and slots is not None and len(queries):
                project = partial(_project, layer, RowAdapters.alike(prompt.adapter), slots.pages)
                keys, values = yield from prompt.vision.keys_values(layer.index, project)
                self._attended.append(_Attended(prompt.vision, prompt.kv, slots, start, queries, keys, values))
                start += len(queries)
                yield

    def attend_features(self, layer: CrossLayer, q: Tensor, piece: slice) -> Tensor:  # noqa: ARG002 - known from before
        """Attend with a piece of the queries to what each row sees -> [rows of the piece, H * Dh]."""
        attended = []
        for each in self._attended:
            first, end = max(piece.start, each.first_row), min(piece.stop, each.end_row)
            if first < end:
                queries = each.queries[first - each.first_row : end - each.first_row]
                runs = each.vision.runs_of(first - each.first_row, end - each.first_row)
                looked, log_sums = attention(queries, each.keys, each.values, runs, layer.scale, each.vision.bias)
                attended.append(looked)
                each.log_sums.append(log_sums)
        return torch.cat(attended)

    def finish(
        self, layer: CrossLayer, hidden: Tensor, looked: Tensor, adapters: RowAdapters | None
    ) -> tuple[Tensor, ...]:
        """End a layer for a piece of the rows that see an image: what goes out, and what attention came to."""
        return layer.finish(hidden, looked, adapters)

    def place(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Put the rows that see an image, [S, D], back among all, [R, D]."""
        if self._index is None:
            return seen
        hidden[self._index] = seen
        return hidden

    def after_layer(self, layer: CrossLayer, hidden: Tensor, *added: Tensor) -> Iterable[None]:
        """Ask each prompt's policy what later layers hold, and store what decoding sees of this one.

        Args:
            layer: has attended.
            hidden: [S, D], the rows that see an image, before the layer.
            added: see `CrossLayer.finish`.
        """
        attended, self._attended = self._attended, []
        sizes = [len(each.queries) for each in attended]
        for each, before, plus in zip(attended, hidden.split(sizes), added[0].split(sizes), strict=True):
            if _is_decided_after(layer.index, each.vision):
                yield from _decide(each, layer, before, plus, self._ranks)
                self._sees_less = self._sees_less or each.vision.has_left
            else:
                _store(each, layer.index)

    def _see(self) -> None:
        """Find the rows that see an image in the layers to come."""
        self._sees_less = False
        seeing: list[int] = []
        self._num_seeing = []
        start = 0
        for prompt in self._prompts:
            runs = prompt.vision.visible_runs() if prompt.vision is not None else []
            rows = [start + row for first, end, _, _ in runs for row in range(first, end)]
            seeing += rows
            self._num_seeing.append(len(rows))
            start += prompt.num_rows
        self._of_seeing = self._adapters_of(self._num_seeing)
        self._index: Tensor | None = None
        """int64 [S]; None if every row sees an image."""
        if len(seeing) < start:
            self._index = upload_ids(seeing, self.rotation.cosines.device)

    def _adapters_of(self, num_rows: Sequence[int]) -> RowAdapters | None:
        """Of so many rows of each prompt."""
        if all(prompt.adapter is None for prompt in self._prompts):
            return None
        adapters = [prompt.adapter for prompt, num in zip(self._prompts, num_rows, strict=True) for _ in range(num)]
        return RowAdapters.of(adapters, self.rotation.cosines.device)


class LookingRows(PromptRows):
    """One prompt that goes as far as the first cross-attention layer, to see what that knows of its images."""

    def __init__(self, prompt: SequenceRows, rotation: Rotation, ranks: Ranks) -> None:
        """Begin.

        Args:
            prompt: with at least one image, and without pages.
            rotation: of its rows.
            ranks: that share the model; only rank 0 sees more than its own heads.
        """
        super().__init__([prompt], rotation, ranks)
        assert prompt.vision is not None
        self._vision = prompt.vision
        self.view: CrossAttentionView | None = None
        """What was seen; None until the pass ends."""

    def read_features(self, layer: CrossLayer, q: Tensor) -> Iterable[None]:
        """See `PromptRows.read_features`; looks and ends the pass."""
        features = self._vision.features
        own_keys, _ = layer.keys_values(features, None)
        queries, keys = (_of_all_heads(self._ranks, part, dim=1) for part in (q, own_keys))
        self.view = _made_view(self._vision, layer, queries, keys, features)
        self.has_ended = True
        return ()


def _project(layer: CrossLayer, adapters: RowAdapters | None, pages: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of features as they are stored."""
    keys, values = layer.keys_values(features, adapters)
    for rows in (keys, values):
        round_as_stored(rows, pages)
    return keys, values


def _of_all_heads(ranks: Ranks, part: Tensor, dim: int) -> Tensor:
    """On rank 0 what all ranks have of their heads, which are along a dimension; policies compare across heads."""
    parts = ranks.gather(part)
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _view(attended: _Attended, layer: CrossLayer, hidden: Tensor, added: Tensor, ranks: Ranks) -> CrossAttentionView:
    vision, features, log_sums = attended.vision, attended.vision.features, attended.all_log_sums
    queries, keys = (_of_all_heads(ranks, part, dim=1) for part in (attended.queries, attended.keys))
    if vision.num_merged:  # policies see kept features only
        places = vision.kept_places
        keys, features, log_sums = keys[places], features[places], None
    view = _made_view(vision, layer, queries, keys, features)
    view.hidden, view.added = hidden, layer.gated(added)
    view.log_sums = None if log_sums is None else _of_all_heads(ranks, log_sums, dim=0)
    return view


def _made_view(
    vision: VisionRows, layer: CrossLayer, queries: Tensor, keys: Tensor, features: Tensor
) -> CrossAttentionView:
    seeing = [images for images in vision.visible_images if images[0] < images[1]]
    return CrossAttentionView(
        queries,
        keys,
        features,
        visibility=upload(feature_visibility(seeing, vision.num_kept).numpy(), queries.device),
        scale=layer.scale,
        num_features=vision.num_kept,
        features_per_tile=vision.features_per_tile,
        wants_picks=vision.trim.return_selection,
        layer=layer.index,
        trained=vision.trained,
    )


def _is_decided_after(layer: int, vision: VisionRows) -> bool:
    stored = vision.stored
    if stored is None:
        return vision.trim.is_asked_after(layer)
    return stored.made_after(layer) is not None or stored.left_after == layer


def _decide(attended: _Attended, layer: CrossLayer, hidden: Tensor, added: Tensor, ranks: Ranks) -> Interruptible[None]:
    """Ask the policy, or what was stored, and store keys and values accordingly."""
    vision = attended.vision
    began_at = time.monotonic()
    if vision.stored is None:
        view = _view(attended, layer, hidden, added, ranks)
        if ranks.shard.size == 1:  # ranks pause together, and this one has all scores
            yield from view.read_scores()
        answer = ranks.decide(lambda: vision.trim.after_layer(view), hidden.device)
    else:
        kept = vision.stored.made_after(layer.index)
        answer = Verdict.LEAVE if kept is None else kept.selection(hidden.device)
    if isinstance(answer, Selection):
        selected_at = time.monotonic()
        store = _store_selected if vision.selection is None else _store_fewer
        store(attended, layer.index, answer)
        vision.trim_times.append(TrimTimes(began_at, selected_at, time.monotonic()))
        return
    _store(attended, layer.index)
    if answer is Verdict.LEAVE:
        vision.leave(layer.index)


def _store(attended: _Attended, layer: int) -> None:
    """Keep all: store what the last row, and so every decoded row, sees."""
    vision, kv = attended.vision, attended.kv
    first, end = vision.held_range
    _hold(vision, kv, layer)
    attended.slots.write_features(layer, attended.keys[first:end], attended.values[first:end])


def _store_selected(attended: _Attended, layer: int, selection: Selection) -> None:
    """Keep these, and the rows that others are merged into."""
    vision, kv = attended.vision, attended.kv
    kept, merged = vision.hold(selection, layer)
    _hold(vision, kv, layer)
    first, end = vision.held_range
    slot = layer % kv.pages.shape[1]
    slots = attended.slots.of_features(layer, end - first)
    is_held = (first <= kept) & (kept < end)
    keys, values = attended.keys, attended.values
    ops.gather_kv(kv.pages, slot, keys, values, selection.kept[is_held], slots[kept[is_held] - first])
    if selection.groups is not None:
        is_held = (first <= merged) & (merged < end)
        mean_keys, mean_values = (selection.groups.mean(rows)[is_held] for rows in (keys, values))
        ops.write_kv(kv.pages, slot, mean_keys, mean_values, slots[merged[is_held] - first])


def _store_fewer(attended: _Attended, layer: int, selection: Selection) -> None:
    """Keep some of what was kept before, and every merged row."""
    vision, kv = attended.vision, attended.kv
    rows = vision.hold_fewer(selection, layer)
    _hold(vision, kv, layer)
    first, end = vision.held_range
    slots = attended.slots.of_features(layer, end - first)
    slot = layer % kv.pages.shape[1]
    ops.gather_kv(kv.pages, slot, attended.keys, attended.values, rows[first:end], slots)


def _hold(vision: VisionRows, kv: KeyValues, layer: int) -> None:
    first, end = vision.held_range
    kv.hold_features(layer, end - first, vision.held_bias)
    vision.layer_rows.append(vision.num_held)
