"""Scenes are clear, seeded, and their splits share no digit image and no word."""

import random
from itertools import pairwise

import numpy as np
import pytest

from training.examples import Example, example_rng, generate_example
from training.render import render
from training.scenes import COLOURS, NUM_HELD_OUT_DIGITS, SHAPES, Scene, Split, digit_ids, sample_scene
from training.words import HELD_OUT_WORDS, TRAIN_WORDS


def _scenes(split: Split, count: int = 300) -> list[Scene]:
    return [sample_scene(example_rng(split, 5, index), split) for index in range(count)]


def _example(index: int) -> Example:
    return generate_example(example_rng("train", 5, index), "train")


def test_same_seed_gives_the_same_example() -> None:
    for index in range(20):
        one, other = _example(index), _example(index)
        assert one.turns == other.turns
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_other_index_gives_another_image() -> None:
    assert _example(0).image.tobytes() != _example(1).image.tobytes()


def test_splits_have_other_seeds() -> None:
    assert example_rng("train", 0, 0).random() != example_rng("held_out", 0, 0).random()


def test_held_out_digits_are_the_last_images_and_never_in_train() -> None:
    train = {image for images in digit_ids("train").values() for image in images}
    held_out = {image for images in digit_ids("held_out").values() for image in images}
    assert held_out == set(range(1797 - NUM_HELD_OUT_DIGITS, 1797))
    assert train == set(range(1797 - NUM_HELD_OUT_DIGITS))
    shown = {image for scene in _scenes("train") if scene.writing for image in scene.writing.digit_images}
    assert shown
    assert shown <= train


def test_held_out_words_are_never_in_train() -> None:
    words = {
        split: {s.writing.text for s in _scenes(split) if s.writing and not s.writing.is_number}
        for split in ("train", "held_out")
    }
    assert words["held_out"] <= set(HELD_OUT_WORDS)
    assert not words["train"] & set(HELD_OUT_WORDS)
    assert words["train"] & set(TRAIN_WORDS)


def test_things_lie_inside_the_image_in_order_and_apart() -> None:
    for scene in _scenes("train"):
        along = [thing.y if scene.is_tall else thing.x for thing in scene.things]
        assert all(after - before >= 8 for before, after in pairwise(along))
        for thing in scene.things:
            assert thing.size / 2 <= thing.x <= scene.width - thing.size / 2
            assert thing.size / 2 <= thing.y <= scene.height - thing.size / 2
        if scene.writing is not None:
            left, top, right, bottom = scene.writing.boxes[0][:2] + scene.writing.boxes[-1][2:]
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_is_drawn_in_its_colour_where_it_stands(shape: str, colour: str) -> None:
    rng = random.Random(1)
    scene = next(s for s in iter(lambda: sample_scene(rng, "train"), None) if len(s.things) == 3 and not s.is_light)
    things = [type(t)(colour, shape, t.x, t.y, t.size) for t in scene.things]
    pixels = np.asarray(render(Scene(scene.width, scene.height, tuple(things), None, False, 3))).astype(int)
    for thing in things:
        reach = thing.size // 2
        box = pixels[thing.y - reach : thing.y + reach, thing.x - reach : thing.x + reach]
        near = np.abs(box - COLOURS[colour]).max(-1) < 60
        assert near.mean() > 0.15
