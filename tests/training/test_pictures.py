"""Harder pictures: answers follow from what is drawn, the splits share nothing, and every mark lies where it should."""

import random
import re

import numpy as np
import pytest
from PIL import Image

from training.charts import Chart, ask_chart_questions, sample_chart
from training.emoji import other_emoji
from training.examples import PICTURES, example_rng, generate_example
from training.marks import NUM_MARKS
from training.object_pictures import ask_object_questions, sample_object_picture
from training.objects import CLASSES, Sticker, draw_sticker, emoji_signs, object_ids
from training.pages import ask_page_questions, sample_page
from training.photographs import photograph_ids
from training.scenes import Split
from training.sources import packages_folder
from training.words import HELD_OUT_WORDS

NEEDS_PACKAGES = pytest.mark.skipif(not packages_folder().is_dir(), reason="needs python -m training.sources")
SPLITS: tuple[Split, Split] = ("train", "held_out")


def _charts(split: Split, count: int = 200) -> list[Chart]:
    return [sample_chart(example_rng(split, 7, index), split) for index in range(count)]


def test_a_chart_is_asked_about_what_its_values_say() -> None:
    asked = 0
    for index, chart in enumerate(_charts("train")):
        for turn in ask_chart_questions(random.Random(index), chart, 6):
            values = dict(zip(chart.labels, chart.values, strict=True))
            if found := re.fullmatch(r"Is (\w+) higher than (\w+)\?", turn.question):
                assert (turn.answer == "yes") == (values[found[1]] > values[found[2]])
            elif "highest?" in turn.question:
                assert values[turn.answer] == max(values.values())
                asked += 1
            elif "lowest?" in turn.question:
                assert values[turn.answer] == min(values.values())
    assert asked > 30


def test_no_chart_belongs_to_both_splits() -> None:
    contents = [{(c.values, c.width, c.height) for c in _charts(split)} for split in SPLITS]
    assert not contents[0] & contents[1]


def test_a_higher_bar_is_drawn_higher() -> None:
    chart = next(chart for chart in _charts("train") if not chart.is_line and len(chart.values) == 2)
    tops = [mark.box[1] for mark in chart.marks if mark.colour is not None]
    assert (tops[0] < tops[1]) == (chart.values[0] > chart.values[1])
    assert chart.draw().size == chart.size


@NEEDS_PACKAGES
@pytest.mark.parametrize("picture", PICTURES)
def test_the_same_seed_draws_the_same_picture_with_marks_inside(picture: str) -> None:
    for index in range(10):
        one, again = (generate_example(example_rng("train", 3, index), "train", 6, {picture: 1.0}) for _ in range(2))
        assert one.image.tobytes() == again.image.tobytes()
        assert one.turns == again.turns
        assert one.turns
        assert one.picture == picture
        assert all(0 < mark.number < NUM_MARKS for mark in one.marks)
        assert all(mark.box[0] < one.size[0] and mark.box[1] < one.size[1] for mark in one.marks)


@NEEDS_PACKAGES
@pytest.mark.parametrize("name", CLASSES)
def test_training_shows_no_design_of_an_emoji_that_is_held_out(name: str) -> None:
    train, held_out = (set(other_emoji(emoji_signs(name, split))) for split in SPLITS)
    assert not train & held_out


@NEEDS_PACKAGES
def test_held_out_objects_and_photographs_are_never_in_train() -> None:
    for name in CLASSES:
        train, held_out = (set(object_ids(split)[name]) for split in SPLITS)
        assert train
        assert held_out
        assert not train & held_out
        assert held_out == {index for index in train | held_out if index % 4 == 2 and index <= max(held_out)}
    assert photograph_ids("held_out")
    assert not {*photograph_ids("train")} & {*photograph_ids("held_out")}


@NEEDS_PACKAGES
@pytest.mark.parametrize("shear", [-0.3, 0.3])
def test_a_sheared_object_is_whole(shear: float) -> None:
    plain, sheared = Image.new("RGB", (400, 400)), Image.new("RGB", (400, 400))
    draw_sticker(plain, Sticker("flag", 0, 200, 200, 200))
    draw_sticker(sheared, Sticker("flag", 0, 200, 200, 200, shear=shear))
    areas = [np.asarray(image.convert("L")).astype(bool).sum() for image in (plain, sheared)]
    assert areas[1] == pytest.approx(areas[0], rel=0.03)


@NEEDS_PACKAGES
def test_an_object_is_where_the_answer_says() -> None:
    for index in range(200):
        picture = sample_object_picture(example_rng("train", 4, index), "train")
        across = [sticker.name for sticker in sorted(picture.stickers, key=lambda sticker: sticker.x)]
        for turn in ask_object_questions(random.Random(index), picture, 6):
            if turn.question == "What is on the left?":
                assert turn.answer == across[0]
            elif turn.question == "What is on the right?":
                assert turn.answer == across[-1]
            elif turn.question.startswith("Is there"):
                assert (turn.answer == "yes") == (turn.question.split()[-1].rstrip("?") in across)


@NEEDS_PACKAGES
def test_a_total_is_the_sum_of_what_is_printed() -> None:
    totals = 0
    for index in range(100):
        page = sample_page(example_rng("held_out", 4, index), "held_out")
        answers = {turn.question: turn.answer for turn in ask_page_questions(random.Random(index), page, 9)}
        if page.layout == "receipt":
            prices = [int(row[1]) for row in page.rows if row[0] not in ("TOTAL", "DATE")]
            assert answers["What is the total?"] == str(sum(prices))
            totals += 1
    assert totals > 10


@NEEDS_PACKAGES
def test_held_out_words_are_never_printed_in_train() -> None:
    for index in range(200):
        page = sample_page(example_rng("train", 5, index), "train")
        assert not {word for row in page.rows for word in row} & {*HELD_OUT_WORDS}
