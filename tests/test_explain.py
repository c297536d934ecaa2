"""Geometry and words of the explanation picture."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from trimserve.api.chunks import ImageSelection
from trimserve.explain import Explained, draw_contact_sheet, draw_explanation

SIDE = 4
TILE = 8 * SIDE
PER_TILE = SIDE * SIDE + 1
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (1, 4), (3, 1), (4, 1)]


def bitmap(features: set[int], num_features: int) -> bytes:
    bits = np.isin(np.arange(num_features), list(features)).astype(np.uint8)
    return np.packbits(bits, bitorder="little").tobytes()


def patch(tiles_wide: int, row: int, column: int) -> int:
    """Feature at a row and column of the whole patch grid."""
    tile = (row // SIDE) * tiles_wide + column // SIDE
    return tile * PER_TILE + 1 + (row % SIDE) * SIDE + column % SIDE


def draw(
    kept: set[int],
    heads: list[set[int]],
    grid: tuple[int, int] = (1, 1),
    question: str = "What?",
    answer: str = "This.",
    num_merged: int = 0,
) -> Image.Image:
    explained = Explained(selection(kept, heads, grid), num_merged, answer)
    return draw_explanation(white(grid), explained, tile_size=TILE, question=question)


def selection(kept: set[int], heads: list[set[int]], grid: tuple[int, int]) -> ImageSelection:
    num_features = grid[0] * grid[1] * PER_TILE
    return ImageSelection(
        tiles_high=grid[0],
        tiles_wide=grid[1],
        features_per_tile=PER_TILE,
        content_height=grid[0] * TILE,
        content_width=grid[1] * TILE,
        kept=bitmap(kept, num_features),
        picks_by_head=tuple(bitmap(picks, num_features) for picks in heads),
    )


def white(grid: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", (grid[1] * TILE, grid[0] * TILE), "white")


def sheet(*kept: set[int], grid: tuple[int, int] = (1, 1), answer: str = "This.") -> Image.Image:
    """One policy for each kept set."""
    explained = {f"p{number}": Explained(selection(each, [], grid), 0, answer) for number, each in enumerate(kept)}
    return draw_contact_sheet(white(grid), explained, tile_size=TILE, question="What?")


def brightness(page: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(page.convert("L"), dtype=float)


def texts_of(monkeypatch: pytest.MonkeyPatch, *args: Any, drawing: Any = draw, **kwargs: Any) -> str:
    """Every text that a drawing writes."""
    texts: list[str] = []

    def remember(_: ImageDraw.ImageDraw, __: Any, text: str, **___: Any) -> None:
        texts.append(text)

    with monkeypatch.context() as patched:
        patched.setattr(ImageDraw.ImageDraw, "text", remember)
        drawing(*args, **kwargs)
    return "\n".join(texts)


@pytest.mark.parametrize("grid", GRIDS)
def test_kept_patch_is_lit_at_its_place(grid: tuple[int, int]) -> None:
    rows, columns = grid[0] * SIDE, grid[1] * SIDE
    here, there = (1, columns - 1), (rows - 2, 2)
    heads = [{patch(grid[1], *here)}, {patch(grid[1], *there)}]
    change = brightness(draw(heads[0], heads, grid)) - brightness(draw(heads[1], heads, grid))

    lit, dimmed = np.argwhere(change > 100), np.argwhere(change < -100)
    width = 1160 if columns > 2 * rows else 570
    size = min(width / columns, 720 / rows)  # pixels of a patch
    for changed in (lit, dimmed):
        assert np.allclose(np.ptp(changed, axis=0) + 1, size, atol=2)
    moved = lit.mean(axis=0) - dimmed.mean(axis=0)
    assert np.allclose(moved, (np.array(here) - there) * size, atol=2)


def test_more_votes_are_brighter_in_the_heat_panel() -> None:
    few, many = patch(1, 0, 0), patch(1, 3, 3)
    kept = {few, many}
    upper = brightness(draw(kept, [{few}, kept, {many}, {many}]))
    lower = brightness(draw(kept, [{many}, kept, {few}, {few}]))
    change = (upper - lower)[:-200, 600:]  # the right panel, without the strip
    assert np.argwhere(change > 50).mean(axis=0).min() > np.argwhere(change < -50).mean(axis=0).max()


def test_class_tokens_do_not_draw() -> None:
    heads = [{5}, {5}]
    first, second = draw({0, 5}, heads, (1, 2)), draw({PER_TILE, 5}, heads, (1, 2))
    assert first.tobytes() == second.tobytes()


def test_every_head_has_its_own_picks_in_the_strip() -> None:
    kept = {1, 16}
    page = draw(kept, [{1}, {16}, kept])
    other = draw(kept, [{1}, kept, {16}])  # as many votes
    changed = np.argwhere(brightness(page) != brightness(other))
    pitch = 146  # of the strip's columns, from the margin of 20 on
    assert changed[:, 0].min() > page.height - 200
    assert 20 + pitch <= changed[:, 1].min() < 20 + 2 * pitch < changed[:, 1].max() < 20 + 3 * pitch


@pytest.mark.parametrize("num_heads", [1, 8, 12, 32, 64])
@pytest.mark.parametrize("grid", GRIDS)
def test_any_number_of_heads_and_tiles_fits_the_page(grid: tuple[int, int], num_heads: int) -> None:
    picks = set(range(1, 9))
    page = draw(picks, [picks] * num_heads, grid)
    margin = brightness(page)[:, -20:]
    assert page.mode == "RGB"
    assert page.width == 1200
    assert page.height < 2200
    assert np.ptp(margin) == 0


def test_caption_tells_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts_of(monkeypatch, {0, 1, 2, 3}, [{0, 1, 2}, {1, 2, 3}], (1, 2), question="Why?", answer="So.")
    assert "Why?" in text
    assert "So." in text
    assert "kept_fraction 0.118: 4 of 34 features kept, 1 x 2 tiles, class tokens 1 of 2." in text
    assert "Each of 2 heads picked 3." in text
    assert "capped" not in text
    assert "head 1" in text


def test_caption_tells_what_was_merged_and_counts_it_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts_of(monkeypatch, {0, 1, 2, 3}, [{0, 1, 2}, {1, 2, 3}], (1, 2), num_merged=5).replace("\n", " ")
    assert "kept_fraction 0.265: 4 of 34 features kept, the other 30 merged into 5 rows, 1 x 2 tiles" in text
    assert "kept features lit, merged ones dark" in text


def test_cap_is_mentioned_where_it_dropped_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts_of(monkeypatch, {1, 2}, [{1, 2}, {2, 3}])
    assert "Together they picked 3; the request capped them." in text


@pytest.mark.parametrize(
    ("num_kept", "account"),
    [
        (17, "kept_fraction 1.000: 17 of 17 features kept, 1 x 1 tiles. Nothing was trimmed."),
        (4, "kept_fraction 0.235: 4 of 17 features kept, 1 x 1 tiles. Chosen without asking any head."),
    ],
)
def test_where_no_head_picked_the_counts_are_told_and_no_votes_drawn(
    num_kept: int, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = texts_of(monkeypatch, set(range(num_kept)), []).replace("\n", " ")
    assert account in text
    assert "head 0" not in text
    assert "votes" not in text


def test_a_contact_sheet_lights_each_policys_patch_in_its_cell() -> None:
    here, there = {patch(1, 0, 0)}, {patch(1, 3, 3)}
    change = brightness(sheet(here, here, there)) - brightness(sheet(here, here, here))
    lit, dimmed = np.argwhere(change > 100), np.argwhere(change < -100)
    side = 275  # of a cell
    left = 20 + 2 * (side + 20)  # of the third
    for changed in (lit, dimmed):
        assert np.allclose(np.ptp(changed, axis=0) + 1, side / SIDE, atol=2)
        assert left <= changed[:, 1].min() <= changed[:, 1].max() < left + side
    assert np.allclose(lit.mean(axis=0) - dimmed.mean(axis=0), 3 * side / SIDE, atol=2)


def test_a_contact_sheet_names_policies_counts_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts_of(monkeypatch, {1, 2}, {3}, drawing=sheet)
    cells = [("p0", "2 of 17 kept", "This."), ("p1", "1 of 17 kept", "This.")]
    assert sorted(text.splitlines()) == sorted(["What?", *cells[0], *cells[1]])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_contact_sheet_of_any_number_of_policies_and_tiles_fits_the_page(grid: tuple[int, int]) -> None:
    for page in (sheet({1}, grid=grid), sheet(*[{1}] * 17, grid=grid, answer="many words " * 200)):
        assert page.width == 1200
        assert np.ptp(brightness(page)[:, -20:]) == 0


def test_texts_of_any_length_fit() -> None:
    short = draw({1}, [{1}])
    long = draw({1}, [{1}], question="", answer="many words " * 2000)
    assert long.height - short.height < 150


def test_a_text_without_spaces_goes_on_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts_of(monkeypatch, {1}, [{1}], question="x" * 200, answer="y" * 50_000).splitlines()
    for sign, size in (("x", 24), ("y", 20)):
        lines = [line for line in written if line.startswith(sign)]
        assert 1 < len(lines) <= 4
        assert all(ImageFont.load_default(size).getlength(line) <= 1160 for line in lines)
    assert "".join(line for line in written if line.startswith("x")) == "x" * 200
    assert lines[-1].endswith(" ...")
