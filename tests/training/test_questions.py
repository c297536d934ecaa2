"""Every answer follows from the scene; the checks here read the question's words, not the generator's code."""

import re
from collections.abc import Callable

import pytest

from training.examples import example_rng, generate_example, which_image
from training.questions import KINDS, Turn, description
from training.scenes import Scene, Thing


def _scene(index: int) -> Scene:
    scene = generate_example(example_rng("train", 9, index), "train").scene
    assert scene is not None
    return scene


def _examples(count: int = 400) -> list[tuple[Scene, Turn]]:
    found = []
    for index in range(count):
        example = generate_example(example_rng("train", 9, index), "train")
        assert example.scene is not None
        found += [(example.scene, turn) for turn in example.turns]
    return found


EXAMPLES = _examples()


def _of_kind(kind: str) -> list[tuple[Scene, Turn]]:
    found = [(scene, turn) for scene, turn in EXAMPLES if turn.kind == kind]
    assert len(found) > 30
    return found


def _matching(scene: Scene, words: str) -> list[Thing]:
    singular = re.sub(r"crosses$", "cross", words)
    named = singular if singular.endswith("cross") else singular.removesuffix("s")
    return [
        thing
        for thing in scene.things
        if all(word in (thing.colour, thing.shape, "thing", "object") for word in named.split())
    ]


def test_every_kind_is_asked_in_several_phrasings() -> None:
    for kind in KINDS:
        assert len({" ".join(turn.question.split()[:2]) for _, turn in _of_kind(kind)}) >= 2


def test_no_question_is_asked_twice_about_one_image() -> None:
    for index in range(50):
        turns = generate_example(example_rng("train", 9, index), "train").turns
        assert len({turn.question for turn in turns}) == len(turns)


@pytest.mark.parametrize(
    ("kind", "value"), [("colour", lambda thing: thing.colour), ("shape", lambda thing: thing.shape)]
)
def test_attribute_questions_name_one_thing_that_has_the_answer(kind: str, value: Callable[[Thing], str]) -> None:
    for scene, turn in _of_kind(kind):
        if scene.writing is not None and turn.question.split()[-1] in ("number?", "word?", "have?"):
            writing = "number" if scene.writing.is_number else "word"
            if f" {writing}" in turn.question:
                assert turn.answer == scene.writing.colour
                continue
        words = set(re.findall(r"\w+", turn.question)) - {"colour", "shape", "thing", "object"}
        named = [thing for thing in scene.things if {thing.colour, thing.shape} & words]
        assert [value(thing) for thing in named] == [turn.answer]


def test_count_answers_count() -> None:
    for scene, turn in _of_kind("count"):
        found = re.search(r"(?:How many|Count the) (.+?)(?: are there\?| do you see\?|\.)$", turn.question)
        assert found is not None
        what = found[1]
        if what in ("digits", "letters"):
            assert scene.writing is not None
            expected = len(scene.writing.text)
        else:
            expected = len(_matching(scene, what))
        assert turn.answer == str(expected)


def test_yes_no_answers_are_true_and_balanced() -> None:
    answers = []
    for scene, turn in _of_kind("yes_no"):
        answers.append(turn.answer == "yes")
        side = re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", turn.question)
        sign = re.fullmatch(r"Is there the (?:digit|letter) (.)\?", turn.question)
        if side is not None:
            (one,), (other,) = _matching(scene, side[1]), _matching(scene, side[3])
            ahead = {"left of": other.x - one.x, "right of": one.x - other.x, "above": other.y - one.y}
            assert answers[-1] == (ahead.get(side[2], one.y - other.y) > 0)
        elif sign is not None:
            assert scene.writing is not None
            assert answers[-1] == (sign[1] in scene.writing.text)
        elif scene.things:
            what = re.search(r" an? (.+)\?$", turn.question)
            assert what is not None
            assert answers[-1] == bool(_matching(scene, what[1]))
    assert 0.4 < sum(answers) / len(answers) < 0.6


def test_where_and_outermost_answers_are_true() -> None:
    for scene, turn in _of_kind("position"):
        furthest = re.search(r"(left|right|top|bottom)(?:\?| edge\?)$", turn.question)
        if turn.answer.split()[0] in ("top", "bottom"):
            (thing,) = [t for t in scene.things if f" {t.shape}" in turn.question]
            row, column = turn.answer.split()
            assert (row == "top") == (thing.y < scene.height / 2)
            assert (column == "left") == (thing.x < scene.width / 2)
        elif furthest is not None:
            order = {"left": lambda t: t.x, "right": lambda t: -t.x, "top": lambda t: t.y, "bottom": lambda t: -t.y}
            assert min(scene.things, key=order[furthest[1]]).name == turn.answer


def test_neighbour_answers_name_the_only_thing_on_that_side() -> None:
    checked = 0
    for scene, turn in _of_kind("position"):
        asked = re.search(r"is (left of|right of|above|below) the (\w+)\?$", turn.question)
        if asked is None:
            continue
        (anchor,) = _matching(scene, asked[2])
        step = {"left of": -1, "above": -1}.get(asked[1], 1)
        beside = []
        for thing in scene.things:
            across, down = thing.x - anchor.x, thing.y - anchor.y
            along, aside = (across, down) if asked[1] in ("left of", "right of") else (down, across)
            if thing is not anchor and along * step > 0 and abs(aside) <= abs(along):
                beside.append(thing.name)
        assert beside == [turn.answer]
        checked += 1
    assert checked > 20


def test_reading_answers_are_what_is_written() -> None:
    for kind in ("digits", "word"):
        for scene, turn in _of_kind(kind):
            assert scene.writing is not None
            assert turn.answer == scene.writing.text
            assert scene.writing.is_number == (kind == "digits")


def test_descriptions_name_everything_and_three_objects_on_average() -> None:
    counts = []
    for scene, turn in _of_kind("description"):
        assert turn.answer == description(scene)
        for thing in scene.things:
            assert thing.name in turn.answer
        assert scene.writing is None or scene.writing.text in turn.answer
        counts.append(len(scene.things) + (scene.writing is not None))
    assert sum(counts) / len(counts) > 3


def test_two_image_question_is_decided_by_one_image() -> None:
    first, second = _scene(0), _scene(1)
    turn = which_image(example_rng("train", 9, 2), first, second)
    assert turn is not None
    found = re.search(r"shows an? (.+), the first", turn.question)
    assert found is not None
    shown, other = (first, second) if turn.answer == "first" else (second, first)
    assert _matching(shown, found[1])
    assert not _matching(other, found[1])


def test_identical_images_decide_nothing() -> None:
    scene = _scene(0)
    assert which_image(example_rng("train", 9, 2), scene, scene) is None
