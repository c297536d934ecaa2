"""Where trimserve means to do otherwise than Meta's code: each is tried on both sides, and must be there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.mllama.processing_mllama import build_string_from_input

from scripts.verify.meta.inputs import meta_pixels
from scripts.verify.meta.judge import IMAGE_TOKEN_ID, Judge
from scripts.verify.meta.prompts import BEGIN, IMAGE, Turn, file_of, meta_chat, meta_raw, noise, our_chat, our_raw
from trimserve.api.prompt import ImageFile
from trimserve.errors import InvalidRequest
from trimserve.model.mllama import Mllama

__all__ = ["Departure", "Trial", "departures"]

ORIENTATION = 274
"""Tag of EXIF."""
DATE_LINES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
MOST_ALIKE = 25_000
"""White space in a row that Meta's tokenizer takes at once."""


@dataclass(frozen=True, slots=True)
class Departure:
    """What both do with an input."""

    given: str
    meta: str
    trimserve: str
    is_seen: Callable[["Trial"], bool]


@dataclass(frozen=True, slots=True)
class Trial:
    """Both sides, with one tokenizer and one tile size."""

    ours: Mllama
    judge: Judge
    format_: Any
    picture: bytes

    def our_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation, here."""
        return list(self.ours.tokenize(our_chat(turns)).token_ids)

    def meta_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The same of Meta's chat format."""
        ids: list[int] = self.format_.encode_dialog_prompt(meta_chat(turns)).tokens
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text by Meta's tokenizer."""
        ids: list[int] = self.format_.tokenizer.encode(text, bos=False, eos=False)
        return ids

    def has(self, ids: Sequence[int], part: Sequence[int]) -> bool:
        """Whether token ids follow each other somewhere."""
        return any(list(ids[at : at + len(part)]) == list(part) for at in range(len(ids)))

    def refusal(self, turns: Sequence[Turn]) -> str:
        """What trimserve says to a conversation."""
        try:
            self.ours.tokenize(our_chat(turns))
        except InvalidRequest as error:
            return str(error)
        return ""

    def same_pixels(self, data: bytes, upright: Image.Image) -> tuple[bool, bool]:
        """Whether Meta's code, and whether trimserve, reads a file as if it held another image."""
        other = file_of(upright)
        tiles, grid = meta_pixels(self.judge, self.format_, data)
        expected, expected_grid = meta_pixels(self.judge, self.format_, other)
        is_meta = grid == expected_grid and torch.equal(tiles, expected)
        ours, ours_expected = (next(self.ours.prepare_images([ImageFile(each)])) for each in (data, other))
        return is_meta, ours.key == ours_expected.key

    def opens(self, data: bytes) -> tuple[bool, bool]:
        """Whether Meta's code, and whether trimserve, makes tiles of a file."""
        try:
            meta_pixels(self.judge, self.format_, data)
            is_meta = True
        except ValueError:
            is_meta = False
        try:
            next(self.ours.prepare_images([ImageFile(data)]))
        except InvalidRequest:
            return is_meta, False
        return is_meta, True


def departures() -> Iterator[Departure]:
    """All of them: token ids, then images."""
    yield Departure(
        "a raw prompt that begins with `<|image|>` and has no begin-of-text",
        "begin-of-text comes first",
        "begin-of-text comes behind the leading image tokens, as in transformers; write it yourself to have it first",
        _begins_behind_images,
    )
    yield Departure(
        "special tokens typed into a raw prompt",
        "text",
        "special tokens; in messages of a chat they are text, as in Meta's",
        _special_in_raw,
    )
    yield Departure(
        "message text that begins with a line break, or with white space that has one",
        "the header's `\\n\\n` and the text are tokenised apart",
        "together, as in transformers: line breaks may merge into one token",
        _line_breaks_merge,
    )
    yield Departure(
        "several text parts in a row in one message",
        "each is tokenised by itself",
        "they are one text",
        lambda trial: _differ(trial, [("user", ["Hel", "lo", trial.picture])], [("user", ["Hello", trial.picture])]),
    )
    yield Departure(
        f"more than {MOST_ALIKE:,} white-space characters in a row",
        f"tokenised in pieces of {MOST_ALIKE:,}",
        "tokenised as one, as in transformers",
        _long_white_space,
    )
    yield Departure(
        "a system message in a chat of text alone",
        "as it is; none is added",
        "by the chat template: Llama's trims it and puts the date before it, and writes the date without one, too",
        _system_message,
    )
    yield Departure(
        "a system message beside an image",
        "as it is",
        "INVALID_ARGUMENT where the chat template refuses it, as Llama's does",
        lambda trial: "system messages" in trial.refusal([("system", ["Be kind."]), ("user", [trial.picture])]),
    )
    yield Departure(
        "a message of a tool",
        "role `tool`, written as `ipython`",
        "INVALID_ARGUMENT: roles are system, user and assistant",
        _tool_role,
    )
    yield Departure(
        "EXIF orientation", "ignored: the picture stays as it lies in the file", "applied", _exif_orientation
    )
    yield Departure("transparent pixels", "the alpha channel is dropped", "composited over white", _transparency)
    yield Departure("16-bit greyscale", "values above 255 are clipped to white", "scaled to 8 bits", _sixteen_bits)
    yield Departure(
        "an image so thin that a side comes out below one pixel",
        "ValueError",
        "that side is one pixel, as in transformers",
        lambda trial: trial.opens(file_of(noise(10_000, 1, seed=0))) == (False, True),
    )
    yield Departure(
        "image files other than PNG, JPEG, WebP, GIF, BMP and TIFF",
        "whatever Pillow opens",
        "INVALID_ARGUMENT",
        lambda trial: trial.opens(file_of(noise(8, 8, seed=0), "PPM")) == (True, False),
    )


def _differ(trial: Trial, turns: Sequence[Turn], as_ours: Sequence[Turn]) -> bool:
    """Whether a conversation differs, and Meta's ids of another one are ours of this one."""
    return trial.our_ids(turns) != trial.meta_ids(turns) and trial.our_ids(turns) == trial.meta_ids(as_ours)


def _begins_behind_images(trial: Trial) -> bool:
    files = [trial.picture]
    begin, text = trial.format_.tokenizer.bos_id, trial.text_ids("hi")
    meta = trial.format_.encode_content(meta_raw(f"{IMAGE}hi", files)).tokens
    bare, written = (
        list(trial.ours.tokenize(our_raw(f"{IMAGE}hi", files, begin=first)).token_ids) for first in ("", BEGIN)
    )
    in_transformers = build_string_from_input(f"{IMAGE}hi", BEGIN, IMAGE) == f"{IMAGE}{BEGIN}hi"
    is_meta = meta == [begin, IMAGE_TOKEN_ID, *text] == written
    return is_meta and bare == [IMAGE_TOKEN_ID, begin, *text] and in_transformers


def _special_in_raw(trial: Trial) -> bool:
    typed, token = "<|eot_id|>", trial.format_.tokenizer.eot_id
    ours, meta = trial.ours.tokenize(our_raw(typed)).token_ids, trial.format_.encode_content(typed).tokens
    chat: list[Turn] = [("user", [trial.picture, typed])]
    return token in ours and token not in meta and trial.our_ids(chat) == trial.meta_ids(chat)


def _line_breaks_merge(trial: Trial) -> bool:
    for text in ("\nHello", "\n\nHello"):
        turns: list[Turn] = [("user", [text, trial.picture])]
        merged = trial.text_ids(f"\n\n{text}")
        apart = [*trial.text_ids("\n\n"), *trial.text_ids(text)]
        ours, meta = trial.our_ids(turns), trial.meta_ids(turns)
        if merged == apart or not trial.has(ours, merged) or not trial.has(meta, apart) or trial.has(ours, apart):
            return False
    return True


def _long_white_space(trial: Trial) -> bool:
    as_long: list[Turn] = [("user", [trial.picture, " " * MOST_ALIKE])]
    longer: list[Turn] = [("user", [trial.picture, " " * (MOST_ALIKE + 1)])]
    is_same = trial.our_ids(as_long) == trial.meta_ids(as_long)
    return is_same and trial.our_ids(longer) != trial.meta_ids(longer)


def _system_message(trial: Trial) -> bool:
    asked: Turn = ("user", ["Hi"])
    given: list[Turn] = [("system", [" Be kind.\n"]), asked]
    for turns, rendered in ((given, "Be kind."), ([asked], "")):
        if not _differ(trial, turns, [("system", [DATE_LINES + rendered]), asked]):
            return False
    return True


def _tool_role(trial: Trial) -> bool:
    turns: list[Turn] = [("user", ["Hi"]), ("tool", ["42"])]
    is_meta = trial.has(trial.meta_ids(turns), trial.text_ids("ipython"))
    return is_meta and "must be one of system, user, assistant" in trial.refusal(turns)


def _exif_orientation(trial: Trial) -> bool:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = noise(70, 40, seed=0)
    data = file_of(image, "PNG", exif=exif)
    as_it_lies, upright = (
        trial.same_pixels(data, image),
        trial.same_pixels(data, image.transpose(Image.Transpose.ROTATE_270)),
    )
    return as_it_lies == (True, False) and upright == (False, True)


def _transparency(trial: Trial) -> bool:
    image = noise(70, 40, seed=0)
    alpha = noise(70, 40, seed=1).convert("L")
    clear = image.copy()
    clear.putalpha(alpha)
    data = file_of(clear, "PNG")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    return trial.same_pixels(data, image) == (True, False) and trial.same_pixels(data, white) == (False, True)


def _sixteen_bits(trial: Trial) -> bool:
    values = np.random.default_rng(0).integers(0, 65536, (40, 70)).astype(np.uint16)
    values[:, ::2] %= 300
    data = file_of(Image.fromarray(values), "PNG")
    clipped = Image.fromarray(values.clip(max=255).astype(np.uint8)).convert("RGB")
    scaled = Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    return trial.same_pixels(data, clipped) == (True, False) and trial.same_pixels(data, scaled) == (False, True)
