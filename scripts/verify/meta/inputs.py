"""Pixels beside those of Meta's image transform, token ids beside those of its chat format."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from scripts.verify.meta.checkpoint import MAX_TILES
from scripts.verify.meta.judge import Judge
from scripts.verify.meta.prompts import Turn, file_of, meta_chat, noise, our_chat
from trimserve.api.prompt import ImageFile
from trimserve.model.mllama import Mllama

__all__ = ["compare_pixels", "compare_tokens", "meta_pixels", "pixels_equal"]

ROOT = Path(__file__).resolve().parents[3]
MODES = {"L": "PNG", "P": "PNG", "1": "PNG", "LA": "PNG", "RGBA": "PNG", "CMYK": "JPEG", "YCbCr": "JPEG", "LAB": "TIFF"}
"""Modes of Pillow, each with a format that can hold it; without transparent pixels."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_PIECES = (
    *("don't ", "I'LL", "'S", "123456", "é", "e\u0301", "漢字", "한국어", "ไทย", "🙂", "👩‍👩‍👧", "ǅ", "²", "Ⅷ", "½"),
    *("<|image|>", "<|eot_id|>", "<|begin_of_text|>", "\n", " ", "  ", "\n\n", "\t", ".\n", "...\r\n", "x"),
)
_SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x85\xa0\u2003\u2028\u3000a1'"


def meta_pixels(judge: Judge, format_: Any, data: bytes) -> tuple[torch.Tensor, tuple[int, int]]:
    """An image file as Meta reads it: tiles float32 [n, 3, side, side], and their rows and columns."""
    image = format_.encode_content(meta_chat([("user", [data])])[0].content).vision.images[0]
    tiles, grid = judge.model.image_transform(image)
    return tiles, grid


def pixels_equal(ours: Mllama, judge: Judge, format_: Any, data: bytes) -> tuple[bool, tuple[int, int]]:
    """Whether both make the same of an image file, bit for bit; and Meta's rows and columns of tiles."""
    tiles, grid = meta_pixels(judge, format_, data)
    [prepared] = ours.prepare_images([ImageFile(data)])
    is_same_grid = grid == (prepared.tiles_high, prepared.tiles_wide)
    return is_same_grid and torch.equal(prepared.pixel_values[: len(tiles)], tiles), grid


def compare_pixels(ours: Mllama, judge: Judge, format_: Any, num_sizes: int) -> dict[str, Any]:
    """Compare images of drawn sizes, and of every mode and format.

    Args:
        ours: any model.
        judge: of the same tile size.
        format_: Meta's chat format, which opens files.
        num_sizes: how many.
    Returns:
        Images, those that differ, and the grids of tiles that were met.
    """
    grids, unequal = set(), []
    for seed, (width, height) in enumerate(_sizes(num_sizes, ours.info.tile_size)):
        is_equal, grid = pixels_equal(ours, judge, format_, file_of(noise(width, height, seed)))
        grids.add(grid)
        if not is_equal:
            unequal.append(f"{width} x {height}")
    image = noise(70, 40, seed=0)
    kinds = [*(("RGB", kind) for kind in FORMATS), *MODES.items()]
    for mode, kind in kinds:
        if not pixels_equal(ours, judge, format_, file_of(image.convert(mode), kind))[0]:
            unequal.append(f"{mode} as {kind}")
    return {"images": num_sizes + len(kinds), "unequal": unequal, "grids": sorted(map(list, grids))}


def _sizes(number: int, side: int) -> Iterator[tuple[int, int]]:
    """Widths and heights from 3 to 1600 pixels, each third close to a grid of tiles."""
    rng = random.Random(0)
    ratios = get_all_supported_aspect_ratios(MAX_TILES)
    for index in range(number):
        if index % 3 == 0:
            high, wide = ratios[index // 3 % len(ratios)]
            scale = side * rng.choice([0.25, 0.5, 0.9])
            yield int(wide * scale) + rng.randint(-1, 1), int(high * scale) + rng.randint(-1, 1)
            continue
        width, height = (int(10 ** rng.uniform(0.5, 3.2)) for _ in range(2))
        yield width, max(height, width // 100)  # thinner ones are a departure of its own


def compare_tokens(ours: Mllama, format_: Any, num_texts: int) -> dict[str, Any]:
    """Compare the token ids of conversations about images, whose texts are drawn or the documents of this project.

    Args:
        ours: with Meta's tokenizer.
        format_: Meta's chat format.
        num_texts: how many to draw.
    Returns:
        Conversations, tokens, and the conversations that differ.
    """
    image = file_of(noise(8, 8, seed=0))
    num_conversations, num_tokens, unequal = 0, 0, []
    for text in _texts(num_texts):
        if set("\n\r") & set(text[: len(text) - len(text.lstrip())]):
            continue  # a departure of its own
        for turns in _conversations(text, image):
            expected = format_.encode_dialog_prompt(meta_chat(turns)).tokens
            num_conversations += 1
            num_tokens += len(expected)
            if expected != list(ours.tokenize(our_chat(turns)).token_ids):
                unequal.append(ascii(text[:60]))
    return {"conversations": num_conversations, "tokens": num_tokens, "unequal": unequal}


def _conversations(text: str, image: bytes) -> Iterator[list[Turn]]:
    yield [("user", [image, text])]
    if text:
        yield [("user", [text, image]), ("assistant", [text]), ("user", [image, image, text]), ("assistant", [text])]


def _texts(num_drawn: int) -> Iterator[str]:
    for document in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]):
        yield document.read_text(encoding="utf-8")
    rng = random.Random(0)
    for _ in range(num_drawn):
        length = rng.randint(0, 60)
        kind = rng.randrange(4)
        if kind == 0:
            yield "".join(chr(rng.randint(32, 126)) for _ in range(length))
        elif kind == 1:
            points = (rng.randint(0, 0x10FFFF) for _ in range(length))
            yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        else:
            yield "".join(rng.choice(_SPACES if kind == 2 else _PIECES) for _ in range(length))
