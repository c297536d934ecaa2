"""Questions about a scene, in several phrasings, and their answers.

A question is asked only where its answer is beyond doubt: one star before "what colour is the star?", a clear
distance before "what is left of it?". Each kind is a function from a scene to one turn, or to None where the
scene has nothing clear to ask.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from training.scenes import COLOURS, SHAPES, Scene, Split, Thing

__all__ = ["KINDS", "TRAINING_EMPHASIS", "Turn", "ask_questions", "description"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    kind: str
    """What it asks for: a key of `KINDS`, or `text_only` or `two_images`."""


def ask_questions(rng: random.Random, scene: Scene, count: int, split: Split) -> list[Turn]:
    """Ask different questions about a scene.

    Args:
        rng: the only source of chance.
        scene: what the image shows.
        count: how many to ask at most; scenes with little in them give fewer.
        split: training asks more of the kinds that are slow to learn.
    """
    shares = {
        kind: share * TRAINING_EMPHASIS.get(kind, 1.0) if split == "train" else share
        for kind, (_, share) in KINDS.items()
    }
    turns: dict[str, Turn] = {}
    for _ in range(4 * count):
        if len(turns) == count:
            break
        ask, _ = KINDS[rng.choices(list(shares), list(shares.values()))[0]]
        turn = ask(rng, scene)
        if turn is not None:
            # A second reading or description of one image would only repeat a long answer.
            turns.setdefault(turn.kind if turn.kind in ("digits", "word", "description") else turn.question, turn)
    return list(turns.values())


def description(scene: Scene) -> str:
    """The sentence that names everything, in order along the image's long side; the writing comes last."""
    names = [f"a{'n' if thing.name[0] in 'aeiou' else ''} {thing.name}" for thing in scene.things]
    if scene.writing is not None:
        names.append(scene.writing.name)
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return listed[0].upper() + listed[1:] + "."


def _ask_colour(rng: random.Random, scene: Scene) -> Turn | None:
    subjects = [(thing.shape, thing.colour) for thing in _single(scene, lambda thing: thing.shape)]
    if scene.writing is not None:
        subjects.append(("number" if scene.writing.is_number else "word", scene.writing.colour))
    if not subjects:
        return None
    name, colour = rng.choice(subjects)
    phrasings = ("What colour is the {}?", "Which colour does the {} have?", "What is the colour of the {}?")
    return Turn(rng.choice(phrasings).format(name), colour, "colour")


def _ask_shape(rng: random.Random, scene: Scene) -> Turn | None:
    subjects = _single(scene, lambda thing: thing.colour)
    if not subjects:
        return None
    thing = rng.choice(subjects)
    phrasings = ("What shape is the {} thing?", "What is the {} object?", "Which shape is {}?")
    return Turn(rng.choice(phrasings).format(thing.colour), thing.shape, "shape")


def _ask_count(rng: random.Random, scene: Scene) -> Turn | None:
    if not scene.things:
        return None
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if rng.random() < 0.85:
        some = rng.choice(scene.things)
        colour, shape = some.colour, some.shape
    what, number = rng.choice(
        (
            ("things", len(scene.things)),
            (f"{colour} things", sum(thing.colour == colour for thing in scene.things)),
            (_plural(shape), sum(thing.shape == shape for thing in scene.things)),
        )
    )
    phrasings = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
    return Turn(rng.choice(phrasings).format(what), str(number), "count")


def _ask_yes_no(rng: random.Random, scene: Scene) -> Turn | None:
    if not scene.things:
        return _ask_yes_no_writing(rng, scene)
    asked = rng.choice((_ask_existence, _ask_existence, _ask_side))(rng, scene)
    return asked if asked is not None else _ask_existence(rng, scene)


def _ask_existence(rng: random.Random, scene: Scene) -> Turn:
    wanted = rng.random() < 0.5
    while True:
        some = rng.choice(scene.things)
        colour, shape = some.colour, some.shape
        if not wanted:  # one attribute changed: a near miss
            colour, shape = rng.choice(((rng.choice(list(COLOURS)), shape), (colour, rng.choice(SHAPES))))
        what, there = rng.choice(
            (
                (f"{colour} {shape}", any((t.colour, t.shape) == (colour, shape) for t in scene.things)),
                (f"{colour} thing", any(t.colour == colour for t in scene.things)),
                (shape, any(t.shape == shape for t in scene.things)),
            )
        )
        if there == wanted:
            break
    phrasings = ("Is there a{} {}?", "Do you see a{} {}?", "Does the image show a{} {}?")
    return Turn(rng.choice(phrasings).format("n" if what[0] in "aeiou" else "", what), _yes(there), "yes_no")


def _ask_side(rng: random.Random, scene: Scene) -> Turn | None:
    named = _single(scene, lambda thing: thing.name)
    if len(named) < 2:
        return None
    one, other = rng.sample(named, 2)
    if rng.random() < 0.5:
        side, distance = rng.choice((("left of", other.x - one.x), ("right of", one.x - other.x)))
    else:
        side, distance = rng.choice((("above", other.y - one.y), ("below", one.y - other.y)))
    if abs(distance) < 10:
        return None
    return Turn(f"Is the {one.name} {side} the {other.name}?", _yes(distance > 0), "yes_no")


def _ask_yes_no_writing(rng: random.Random, scene: Scene) -> Turn | None:
    writing = scene.writing
    if writing is None:
        return None
    if rng.random() < 0.3:
        wanted = rng.choice(("number", "word"))
        return Turn(f"Is there a {wanted}?", _yes((wanted == "number") == writing.is_number), "yes_no")
    alphabet = "0123456789" if writing.is_number else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    sign = rng.choice(writing.text if rng.random() < 0.5 else alphabet)
    there = sign in writing.text
    return Turn(f"Is there the {'digit' if writing.is_number else 'letter'} {sign}?", _yes(there), "yes_no")


def _ask_position(rng: random.Random, scene: Scene) -> Turn | None:
    if not scene.things:
        return None
    return rng.choice((_ask_where, _ask_outermost, _ask_neighbour, _ask_neighbour))(rng, scene)


def _ask_where(rng: random.Random, scene: Scene) -> Turn | None:
    clear = [
        thing
        for thing in _single(scene, lambda thing: thing.shape)
        if abs(thing.x / scene.width - 0.5) > 0.08 and abs(thing.y / scene.height - 0.5) > 0.08
    ]
    if not clear:
        return None
    thing = rng.choice(clear)
    row, column = (
        "top" if thing.y < scene.height / 2 else "bottom",
        "left" if thing.x < scene.width / 2 else "right",
    )
    phrasings = ("Where is the {}?", "In which corner is the {}?", "Where do you see the {}?")
    return Turn(rng.choice(phrasings).format(thing.shape), f"{row} {column}", "position")


def _ask_outermost(rng: random.Random, scene: Scene) -> Turn | None:
    if len(scene.things) < 2:
        return None
    side, place = rng.choice(tuple(_PLACES.items()))
    first, second = sorted(scene.things, key=place)[:2]
    if place(second) - place(first) < 8:
        return None
    phrasings = ("What is furthest {}?", "Which thing is closest to the {} edge?")
    return Turn(rng.choice(phrasings).format(side), first.name, "position")


def _ask_neighbour(rng: random.Random, scene: Scene) -> Turn | None:
    found = []
    for anchor in _single(scene, lambda thing: thing.shape):
        for side, words in _SIDES.items():
            inside = [t for t in scene.things if t is not anchor and _on_side(anchor, t, side, slack=1.0)]
            about = [t for t in scene.things if t is not anchor and _on_side(anchor, t, side, slack=1.5)]
            if len(about) == 1 and inside == about:
                found.append((anchor, words, inside[0]))
    if not found:
        return None
    anchor, words, answer = rng.choice(found)
    phrasings = ("What is {} the {}?", "Which thing is {} the {}?")
    return Turn(rng.choice(phrasings).format(words, anchor.shape), answer.name, "position")


def _on_side(anchor: Thing, thing: Thing, side: tuple[int, int], slack: float) -> bool:
    across, down = side
    along = across * (thing.x - anchor.x) + down * (thing.y - anchor.y)
    aside = abs(down * (thing.x - anchor.x)) + abs(across * (thing.y - anchor.y))
    return along > 0 and aside <= slack * along


def _ask_digits(rng: random.Random, scene: Scene) -> Turn | None:
    if scene.writing is None or not scene.writing.is_number:
        return None
    phrasings = ("What number is written?", "Read the number.", "Which number do you see?")
    return Turn(rng.choice(phrasings), scene.writing.text, "digits")


def _ask_word(rng: random.Random, scene: Scene) -> Turn | None:
    if scene.writing is None or scene.writing.is_number:
        return None
    return Turn(
        rng.choice(("What word is written?", "Read the word.", "Which word do you see?")),
        scene.writing.text,
        "word",
    )


def _ask_sign(rng: random.Random, scene: Scene) -> Turn | None:
    writing = scene.writing
    if writing is None:
        return None
    what = "digit" if writing.is_number else "letter"
    if rng.random() < 0.25:
        return Turn(f"How many {what}s are there?", str(len(writing.text)), "count")
    named = dict(zip(("first", "second", "third", "fourth", "fifth"), writing.text, strict=False))
    place, sign = rng.choice((*named.items(), ("last", writing.text[-1])))
    return Turn(rng.choice(("What is the {} {}?", "Read the {} {}.")).format(place, what), sign, "sign")


def _ask_description(rng: random.Random, scene: Scene) -> Turn | None:
    if not scene.things and (scene.writing is None or rng.random() < 0.7):
        return None
    phrasings = (
        "Describe the image.",
        "Describe the picture in one sentence.",
        "What do you see?",
        "What is in the image?",
    )
    return Turn(rng.choice(phrasings), description(scene), "description")


KINDS: dict[str, tuple[Callable[[random.Random, Scene], Turn | None], float]] = {
    "colour": (_ask_colour, 1.0),
    "shape": (_ask_shape, 1.0),
    "count": (_ask_count, 1.0),
    "yes_no": (_ask_yes_no, 1.2),
    "position": (_ask_position, 1.5),
    "digits": (_ask_digits, 1.6),
    "word": (_ask_word, 1.6),
    "sign": (_ask_sign, 1.0),
    "description": (_ask_description, 1.2),
}
"""How each kind is asked, and how often. `sign` is one digit or one letter of the writing."""

TRAINING_EMPHASIS: dict[str, float] = {
    "colour": 0.4,
    "shape": 0.4,
    "count": 4.0,
    "yes_no": 2.0,
    "position": 1.5,
    "sign": 1.5,
    "description": 4.0,
    "digits": 4.0,
    "word": 4.0,
}
"""How much oftener training asks a kind than `KINDS` says: colours are learned first, reading last."""

_PLACES: dict[str, Callable[[Thing], int]] = {
    "left": lambda thing: thing.x,
    "right": lambda thing: -thing.x,
    "top": lambda thing: thing.y,
    "bottom": lambda thing: -thing.y,
}
_SIDES = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}


def _single(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    counts = Counter(key(thing) for thing in scene.things)
    return [thing for thing in scene.things if counts[key(thing)] == 1]


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"
