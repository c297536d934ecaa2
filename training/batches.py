"""Packs examples into tensors: several questions behind one image, each as if it were asked alone.

A row is a prefix (chat header and image tokens) and segments, the questions. A segment sees the prefix and
itself, and its positions follow the prefix, so that training shows exactly the prompts that serving will
feed, while the vision encoder, most of the cost, runs once. Some rows are one conversation instead, and
text-only chats ride along as segments that see neither prefix nor image.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaProcessor

from training.examples import SCENES_ONLY, TEXT_ONLY, Example, generate_example, which_image
from training.patches import IGNORED, pad_patch_labels
from training.questions import Turn
from training.scenes import Split
from training.tokenizer import IMAGE_TOKEN

__all__ = ["Batch", "Batcher"]

_USER_HEADER = "<|start_header_id|>user<|end_header_id|>\n\n"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(slots=True)
class Batch:
    """What one training step reads."""

    input_ids: Tensor
    """int64 [B, T]"""
    position_ids: Tensor
    """int64 [B, T]"""
    attention_mask: Tensor
    """bool [B, 1, T, T]"""
    cross_attention_mask: Tensor
    """int64 [B, T, images, 4]"""
    labels: Tensor
    """int64 [B, T]: the token to predict after each position, -100 where none is asked."""
    pixel_values: Tensor
    """float32 [B, images, 4, 3, 64, 64]"""
    aspect_ratio_ids: Tensor
    """int64 [B, images]"""
    aspect_ratio_mask: Tensor
    """int64 [B, images, 4]"""
    marks: Tensor
    """int64 [B, images * 4, 64]: what covers each patch; see `PatchHead`."""
    colours: Tensor
    """int64 [B, images * 4, 64]: its colour."""
    turns: Tensor
    """int64 [B, T]: which turn a label belongs to, an index into `kinds`; -100 where there is no label."""
    kinds: list[str]
    """Kind of each turn of the batch."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tensors: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "kinds"
        }
        return replace(self, **tensors)


@dataclass(slots=True)
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[int]
    """0 is the prefix; -1 a segment that sees neither prefix nor image."""
    images_seen: list[int]
    """How many of the row's images each token sees, counted from `first_image_seen`."""
    first_image_seen: list[int]
    labels: list[int]
    turns: list[int]
    kinds: list[str]


class Batcher:
    """Makes batches from the generator."""

    def __init__(
        self, processor: MllamaProcessor, num_turns: int = 6, pictures: Mapping[str, float] = SCENES_ONLY
    ) -> None:
        """Make a batcher.

        Args:
            processor: of the checkpoint.
            num_turns: questions behind each image.
            pictures: how often each kind of picture comes.
        """
        self._processor = processor
        self._pictures = pictures
        self._num_turns = num_turns
        self._ids: dict[str, list[int]] = {}

    def make(self, rng: random.Random, split: Split, num_rows: int, num_images: int = 1) -> Batch:
        """Draw a batch.

        Args:
            rng: the only source of chance.
            split: whose digits and words it may show.
            num_rows: B.
            num_images: images of each row, 1 or 2.
        """
        rows, examples = [], []
        for _ in range(num_rows):
            shown = [generate_example(rng, split, self._num_turns, self._pictures) for _ in range(num_images)]
            examples.append(shown)
            rows.append(self._one_image(rng, shown[0]) if num_images == 1 else self._two_images(rng, *shown))
        return self._collate(rows, examples)

    def _one_image(self, rng: random.Random, example: Example) -> _Row:
        row = self._prefix(1)
        turns = example.turns
        if rng.random() < 0.12:
            self._add_text_only(rng, row)
            turns = turns[: self._num_turns // 2]  # the text-only prompt is long: keep the rows of similar length
        if rng.random() < 0.15:
            self._add_conversation(row, turns)
        else:
            for number, turn in enumerate(turns, start=1):
                self._add_segment(row, turn, number)
        return row

    def _two_images(self, rng: random.Random, first: Example, second: Example) -> _Row:
        if rng.random() < 0.3:  # each image with its own question; later rows see the later image only
            row = self._prefix(1)
            self._add_conversation(row, first.turns[:1])
            self._add_next_image(row, second.turns[0])
            return row
        row = self._prefix(2)
        turns: list[Turn | None] = []
        if first.scene is not None and second.scene is not None:
            turns += [which_image(rng, first.scene, second.scene) for _ in range(self._num_turns // 2)]
        for place, example in (("first", first), ("second", second)):
            turns += [_about(turn, place) for turn in example.turns[:2]]
        distinct = {turn.question: turn for turn in turns if turn is not None}
        for number, turn in enumerate(distinct.values(), start=1):
            self._add_segment(row, turn, number)
        return row

    def _prefix(self, num_images: int) -> _Row:
        ids = self._encode("<|begin_of_text|>" + _USER_HEADER + IMAGE_TOKEN * num_images)
        seen = [0] * (len(ids) - num_images) + list(range(1, num_images + 1))
        blank = [IGNORED] * len(ids)
        return _Row(list(ids), list(range(len(ids))), [0] * len(ids), seen, [0] * len(ids), blank, list(blank), [])

    def _add_segment(self, row: _Row, turn: Turn, number: int) -> None:
        seen = max(row.images_seen)
        self._append(row, *self._turn_ids(turn), turn.kind, start=row.segments.count(0), segment=number, seen=seen)

    def _add_conversation(self, row: _Row, turns: tuple[Turn, ...]) -> None:
        start = row.segments.count(0)
        for number, turn in enumerate(turns):
            question, answer = self._turn_ids(turn)
            question = self._encode(_USER_HEADER) + question if number else question
            self._append(row, question, answer, turn.kind, start=start, segment=1, seen=1)
            start += len(question) + len(answer)

    def _add_next_image(self, row: _Row, turn: Turn) -> None:
        question, answer = self._turn_ids(turn)
        header = self._encode(_USER_HEADER)
        start = row.positions[-1] + 1
        self._append(row, header, [], turn.kind, start=start, segment=1, seen=1)
        question = self._encode(IMAGE_TOKEN) + question
        self._append(row, question, answer, turn.kind, start=start + len(header), segment=1, seen=1, first=1)

    def _add_text_only(self, rng: random.Random, row: _Row) -> None:
        turn = rng.choice(TEXT_ONLY)
        chat = [{"role": "user", "content": turn.question}]
        if rng.random() < 0.3:
            chat.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        date = f"{rng.randint(1, 28):02} {rng.choice(_MONTHS)} {rng.randint(2023, 2030)}"
        prompt = self._processor.apply_chat_template(chat, add_generation_prompt=True, date_string=date)
        answer = self._encode(turn.answer + "<|eot_id|>")
        self._append(row, self._encode(prompt), answer, turn.kind, start=0, segment=-1, seen=0)

    def _append(
        self,
        row: _Row,
        question: list[int],
        answer: list[int],
        kind: str,
        *,
        start: int,
        segment: int,
        seen: int,
        first: int = 0,
    ) -> None:
        ids = question + answer
        row.ids += ids
        row.positions += range(start, start + len(ids))
        row.segments += [segment] * len(ids)
        row.images_seen += [seen] * len(ids)
        row.first_image_seen += [first] * len(ids)
        row.labels += [IGNORED] * len(ids)
        row.turns += [IGNORED] * len(ids)
        if answer:
            begin, end = len(row.ids) - len(answer) - 1, len(row.ids) - 1
            row.labels[begin:end] = answer
            row.turns[begin:end] = [len(row.kinds)] * len(answer)
            row.kinds.append(kind)

    def _turn_ids(self, turn: Turn) -> tuple[list[int], list[int]]:
        prompt = turn.question + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        return self._encode(prompt), self._encode(turn.answer + "<|eot_id|>")

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 50_000:
                self._ids.clear()
            self._ids[text] = self._processor.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def _collate(self, rows: list[_Row], examples: list[list[Example]]) -> Batch:
        images = self._processor.image_processor([[e.image for e in shown] for shown in examples], return_tensors="pt")
        marks, colours = pad_patch_labels(examples)
        segments = _pad([row.segments for row in rows], -99)
        same = segments[:, :, None] == segments[:, None, :]
        prefix = (segments[:, None, :] == 0) & (segments[:, :, None] > 0)
        causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
        first_turn = np.cumsum([0, *(len(row.kinds) for row in rows[:-1])])
        turns = [
            [turn + before if turn >= 0 else turn for turn in row.turns]
            for row, before in zip(rows, first_turn, strict=True)
        ]
        return Batch(
            input_ids=_pad([row.ids for row in rows], self._processor.tokenizer.pad_token_id),
            position_ids=_pad([row.positions for row in rows], 0),
            attention_mask=((same | prefix) & causal)[:, None],
            cross_attention_mask=_visible(rows, images["aspect_ratio_mask"]),
            labels=_pad([row.labels for row in rows], IGNORED),
            pixel_values=images["pixel_values"],
            aspect_ratio_ids=images["aspect_ratio_ids"],
            aspect_ratio_mask=images["aspect_ratio_mask"],
            marks=marks,
            colours=colours,
            turns=_pad(turns, IGNORED),
            kinds=[kind for row in rows for kind in row.kinds],
        )


def _pad(rows: list[list[int]], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = torch.tensor(row)
    return padded


def _visible(rows: list[_Row], tiles: Tensor) -> Tensor:
    last = _pad([row.images_seen for row in rows], 0)
    first = _pad([row.first_image_seen for row in rows], 0)
    image = torch.arange(tiles.shape[1])
    sees = (first[..., None] <= image) & (image < (first + last)[..., None])
    return sees[..., None] * tiles[:, None]


def _about(turn: Turn, place: str) -> Turn:
    question = turn.question[0].lower() + turn.question[1:]
    return Turn(f"In the {place} image: {question}", turn.answer, "two_images")
