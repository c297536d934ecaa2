"""A picture of what trimming kept of an image: one look tells what the question made the model look at.

Draws from an image and its `ImageSelection` alone, with Pillow; it knows nothing about models or servers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trimserve.api.chunks import ImageSelection
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Explained", "draw_contact_sheet", "draw_explanation", "draw_kept", "draw_votes", "selection_of"]

Picture = Image.Image
Grid = NDArray[np.float32]
"""One number per patch, [rows, columns] over the whole tile grid."""

_WIDTH: Final = 1200
_GAP: Final = 20
_SMALL_GAP: Final = 8
_MAX_LINES: Final = 4
_MAX_HEIGHT: Final = 720
_BACKGROUND: Final = (22, 24, 29)
_PADDING: Final = (92, 96, 106)
_TILE_LINE: Final = (0, 190, 255)
_INK: Final = (236, 238, 242)
_FAINT_INK: Final = (160, 166, 176)
_ANSWER: Final = (255, 204, 92)
_HEAT: Final = ((68, 1, 84), (187, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of few to many votes, evenly spaced."""
_DIMMED: Final = 0.22
"""Brightness that a dropped patch keeps, as a share of its own."""
_HEAT_OPACITY: Final = 0.75


_SHEET_COLUMNS: Final = 4
_PANEL_WIDTH: Final = (_WIDTH - 3 * _GAP) // 2


@dataclass(frozen=True, slots=True)
class Explained:
    """An answer and what of the image was kept for it."""

    selection: ImageSelection
    num_merged: int
    """Rows that the other features were merged into; 0 when they were dropped."""
    answer: str


def selection_of(message: pb.ImageSelection) -> ImageSelection:
    """What a server told of an image, as plain data.

    Args:
        message: one of `selections`.
    """
    return ImageSelection(
        tiles_high=message.tiles_high,
        tiles_wide=message.tiles_wide,
        features_per_tile=message.features_per_tile,
        content_height=message.content_height,
        content_width=message.content_width,
        kept=message.kept,
        picks_by_head=tuple(message.picks_by_head),
    )


def draw_kept(image: Picture, selection: ImageSelection, *, tile_size: int) -> Picture:
    """Draw the image as the model saw it, with dropped patches dimmed.

    Args:
        image: upright RGB, before any resizing.
        selection: what was kept of it.
        tile_size: pixels along the side of one tile.
    Returns:
        RGB, at most 570 pixels wide.
    """
    return _kept_panel(_fit(_as_the_model_saw_it(image, selection, tile_size), _PANEL_WIDTH, _MAX_HEIGHT), selection)


def draw_votes(image: Picture, selection: ImageSelection, *, tile_size: int) -> Picture | None:
    """Draw how many heads picked each patch, as heat on the image.

    Args:
        image: upright RGB, before any resizing.
        selection: what was kept of it.
        tile_size: pixels along the side of one tile.
    Returns:
        RGB, at most 570 pixels wide; None if no head was asked.
    """
    heads = [_patch_grid(picks, selection) for picks in selection.picks_by_head]
    if not heads:
        return None
    seen = _fit(_as_the_model_saw_it(image, selection, tile_size), _PANEL_WIDTH, _MAX_HEIGHT)
    return _votes_panel(seen, heads, selection)[1]


def draw_contact_sheet(image: Picture, explained: Mapping[str, Explained], *, tile_size: int, question: str) -> Picture:
    """Draw what several policies kept of an image for one question: dropped patches dimmed, the answer below.

    Args:
        image: upright RGB, before any resizing.
        explained: by the policy's name, at least one.
        tile_size: pixels along the side of one tile.
        question: caption.
    Returns:
        RGB, 1200 pixels wide.
    """
    width = (_WIDTH - 2 * _GAP - (_SHEET_COLUMNS - 1) * _GAP) // _SHEET_COLUMNS
    cells = []
    for policy, each in explained.items():
        selection = each.selection
        seen = _fit(_as_the_model_saw_it(image, selection, tile_size), width, 2 * width)
        kept = _bits(selection.kept, selection)
        merged = f" + {each.num_merged} merged" if each.num_merged else ""
        lines = [
            *(_text(line, 20, _INK) for line in _wrapped(policy, 20, width)),
            _text(f"{kept.sum()} of {kept.size} kept{merged}", 14),
            _kept_panel(seen, selection),
            *(_text(line, 16, _ANSWER) for line in _wrapped(each.answer, 16, width)),
        ]
        as_wide_as_others = Image.new("RGB", (width, 1), _BACKGROUND)
        cells.append(_stacked([*lines, as_wide_as_others], _SMALL_GAP // 2))
    rows = [_beside(cells[at : at + _SHEET_COLUMNS], _GAP) for at in range(0, len(cells), _SHEET_COLUMNS)]
    captions = [_text(line, 24, _INK) for line in _wrapped(question, 24)]
    return _page(_stacked([_stacked(captions, _SMALL_GAP), *rows], _GAP))


def draw_explanation(image: Picture, explained: Explained, *, tile_size: int, question: str) -> Picture:
    """Draw the image as the model saw it, with what was kept lit.

    From top to bottom: question, answer and counts; the image with dropped patches dimmed beside (or above)
    the votes, how many heads picked each patch; and each query head's own picks. Class tokens have no place
    in the image and are counted only.

    Args:
        image: upright RGB, before any resizing.
        explained: what was kept of it, and the answer, which is a caption.
        tile_size: pixels along the side of one tile.
        question: caption.
    Returns:
        RGB, 1200 pixels wide.
    """
    selection, num_merged = explained.selection, explained.num_merged
    seen = _as_the_model_saw_it(image, selection, tile_size)
    heads = [_patch_grid(picks, selection) for picks in selection.picks_by_head]
    is_wide = seen.width > 2 * seen.height
    width = _WIDTH - 2 * _GAP if is_wide else _PANEL_WIDTH
    panel = _fit(seen, width, _MAX_HEIGHT)
    is_padded = seen.size != (selection.content_width, selection.content_height)
    title = "kept features lit, merged ones dark" if num_merged else "kept features lit"
    title = f"{title}, padding plain grey" if is_padded else title
    panels = [_titled(_text(title, 16), _kept_panel(panel, selection))]
    if heads:
        panels.append(_titled(*_votes_panel(panel, heads, selection)))
    blocks = [
        _captions(question, explained.answer, _account(selection, num_merged)),
        _stacked(panels, _GAP) if is_wide else _beside(panels, _GAP),
    ]
    if heads:
        blocks.append(_head_strip(seen, heads))
    return _page(_stacked(blocks, _GAP))


def _kept_panel(seen: Picture, selection: ImageSelection) -> Picture:
    return _with_tiles(_lit(seen, _patch_grid(selection.kept, selection)), selection)


def _votes_panel(seen: Picture, heads: Sequence[Grid], selection: ImageSelection) -> tuple[Picture, Picture]:
    """Legend and heat."""
    votes = np.sum(np.stack(heads), axis=0)
    heat = _with_tiles(_heat(seen, votes / max(1, votes.max())), selection)
    return _legend(int(votes.max()), len(heads)), heat


def _page(content: Picture) -> Picture:
    page = Image.new("RGB", (_WIDTH, content.height + 2 * _GAP), _BACKGROUND)
    page.paste(content, (_GAP, _GAP))
    return page


def _patch_grid(bitmap: bytes, selection: ImageSelection) -> Grid:
    """1 where the bitmap has a patch, 0 elsewhere; class tokens left out."""
    high, wide, side = selection.tiles_high, selection.tiles_wide, isqrt(selection.features_per_tile - 1)
    patches = _bits(bitmap, selection).reshape(high, wide, -1)[:, :, 1:].reshape(high, wide, side, side)
    return patches.swapaxes(1, 2).reshape(high * side, wide * side).astype(np.float32)


def _bits(bitmap: bytes, selection: ImageSelection) -> NDArray[np.uint8]:
    num_features = selection.tiles_high * selection.tiles_wide * selection.features_per_tile
    return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=num_features, bitorder="little")


def _as_the_model_saw_it(image: Picture, selection: ImageSelection, tile_size: int) -> Picture:
    size = (selection.tiles_wide * tile_size, selection.tiles_high * tile_size)
    canvas = Image.new("RGB", size, _PADDING)
    content = (selection.content_width, selection.content_height)
    canvas.paste(image.resize(content, Image.Resampling.BILINEAR))
    return canvas


def _fit(picture: Picture, max_width: int, max_height: int) -> Picture:
    scale = min(max_width / picture.width, max_height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _over(picture: Picture, grid: Grid) -> Picture:
    """The grid, in [0, 1], as a mask of the picture's size."""
    mask = Image.fromarray(np.round(grid * 255).astype(np.uint8))
    return mask.resize(picture.size, Image.Resampling.NEAREST)


def _lit(picture: Picture, grid: Grid) -> Picture:
    """The picture where the grid is 1, a dark grey one elsewhere."""
    return Image.composite(picture, _dark(picture, _DIMMED), _over(picture, grid))


def _heat(picture: Picture, votes: Grid) -> Picture:
    """A dark grey picture under the colours of the votes, in [0, 1]; no colour where nobody voted."""
    colors = Image.fromarray(_heat_colors(votes)).resize(picture.size, Image.Resampling.NEAREST)
    opacity = np.where(votes > 0, np.float32(_HEAT_OPACITY), np.float32(0))
    return Image.composite(colors, _dark(picture, 2 * _DIMMED), _over(picture, opacity))


def _dark(picture: Picture, brightness: float) -> Picture:
    return Image.blend(Image.new("RGB", picture.size), picture.convert("L").convert("RGB"), brightness)


def _heat_colors(values: Grid) -> NDArray[np.uint8]:
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _with_tiles(picture: Picture, selection: ImageSelection) -> Picture:
    draw = ImageDraw.Draw(picture)
    for row in range(1, selection.tiles_high):
        y = round(picture.height * row / selection.tiles_high)
        draw.line([(0, y), (picture.width, y)], fill=_TILE_LINE)
    for column in range(1, selection.tiles_wide):
        x = round(picture.width * column / selection.tiles_wide)
        draw.line([(x, 0), (x, picture.height)], fill=_TILE_LINE)
    return picture


def _legend(most: int, num_heads: int) -> Picture:
    gradient = np.tile(np.linspace(0, 1, 120, dtype=np.float32), (14, 1))
    bar = Image.blend(Image.new("RGB", (120, 14)), Image.fromarray(_heat_colors(gradient)), _HEAT_OPACITY)
    return _beside([_text("votes: 1 head", 16), bar, _text(f"{most} of {num_heads} heads", 16)], _SMALL_GAP)


def _head_strip(seen: Picture, heads: Sequence[Grid]) -> Picture:
    is_tall = seen.height > 2 * seen.width
    columns = 16 if is_tall or len(heads) > 32 else 8
    width = (_WIDTH - 2 * _GAP - (columns - 1) * _SMALL_GAP) // columns
    thumbnail = _fit(seen, width, 4 * width)
    cells = [_titled(_text(f"head {head}", 12), _lit(thumbnail, grid)) for head, grid in enumerate(heads)]
    rows = [_beside(cells[at : at + columns], _SMALL_GAP) for at in range(0, len(cells), columns)]
    return _stacked(rows, _SMALL_GAP)


def _captions(question: str, answer: str, account: str) -> Picture:
    lines = [
        *(_text(line, 24, _INK) for line in _wrapped(question, 24)),
        *(_text(line, 20, _ANSWER) for line in _wrapped(answer, 20)),
        *(_text(line, 16) for line in _wrapped(account, 16)),
    ]
    return _stacked(lines, _SMALL_GAP)


def _account(selection: ImageSelection, num_merged: int) -> str:
    """The counts in words."""
    kept = _bits(selection.kept, selection)
    grid = f"{selection.tiles_high} x {selection.tiles_wide} tiles"
    merged = f", the other {kept.size - kept.sum()} merged into {num_merged} rows" if num_merged else ""
    fraction = (
        f"kept_fraction {(kept.sum() + num_merged) / kept.size:.3f}: {kept.sum()} of {kept.size} features kept"
        f"{merged}, {grid}"
    )
    if not selection.picks_by_head:
        return f"{fraction}. {'Nothing was trimmed.' if kept.all() else 'Chosen without asking any head.'}"
    picks = np.stack([_bits(head, selection) for head in selection.picks_by_head])
    class_tokens = kept[:: selection.features_per_tile]
    account = (
        f"{fraction}, class tokens {class_tokens.sum()} of {class_tokens.size}. "
        f"Each of {len(picks)} heads picked {picks.sum(axis=1).max()}."
    )
    num_picked = int(picks.any(axis=0).sum())
    capped = num_picked > kept.sum()
    return f"{account} Together they picked {num_picked}; the request capped them." if capped else account


def _wrapped(text: str, size: int, width: float = _WIDTH - 2 * _GAP) -> list[str]:
    """Lines that fit the width, at most `_MAX_LINES`; what is longer than a line is cut."""
    font = ImageFont.load_default(size)
    width -= font.getlength(" ...")
    lines = [""]
    for word in text[: _MAX_LINES * _WIDTH].split():  # no sign is narrower than a pixel
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for sign in word:
            if lines[-1] and font.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
    return lines if len(lines) <= _MAX_LINES else [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1]} ..."]


def _text(text: str, size: int, color: tuple[int, int, int] = _FAINT_INK) -> Picture:
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (max(1, round(font.getlength(text))), round(1.3 * size)), _BACKGROUND)
    ImageDraw.Draw(picture).text((0, 0), text, fill=color, font=font)
    return picture


def _titled(title: Picture, picture: Picture) -> Picture:
    return _stacked([title, picture], _SMALL_GAP // 2)


def _stacked(pictures: Sequence[Picture], gap: int) -> Picture:
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), _BACKGROUND)
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def _beside(pictures: Sequence[Picture], gap: int) -> Picture:
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (width, max(picture.height for picture in pictures)), _BACKGROUND)
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width + gap
    return page
