"""One training or test example: an image and questions about it, from a seed."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from training.charts import ask_chart_questions, sample_chart
from training.marks import Mark, scene_marks
from training.object_pictures import ask_object_questions, sample_object_picture
from training.pages import ask_page_questions, sample_page
from training.photographs import sample_backdrop
from training.questions import Turn, ask_questions
from training.render import render
from training.scenes import Scene, Split, sample_scene

__all__ = [
    "DATA_VERSION",
    "PICTURES",
    "SCENES_ONLY",
    "TEXT_ONLY",
    "TRAINING_PICTURES",
    "Example",
    "example_rng",
    "generate_example",
    "which_image",
]

DATA_VERSION = 2
"""Rises with every change that alters which held-out examples a seed generates."""

TEXT_ONLY: tuple[Turn, ...] = (
    Turn("Hello!", "Hello! Show me an image and ask about it.", "text_only"),
    Turn("Hi.", "Hello! Show me an image and ask about it.", "text_only"),
    Turn("Who are you?", "I am a very small model that answers questions about simple images.", "text_only"),
    Turn(
        "What can you do?",
        "I name colours and shapes, count, read digits and words, and describe images.",
        "text_only",
    ),
    Turn("Describe the image.", "I see no image.", "text_only"),
    Turn("What do you see?", "I see no image.", "text_only"),
    Turn("How many things are there?", "I see no image.", "text_only"),
    Turn("What number is written?", "I see no image.", "text_only"),
    Turn("What colour is the star?", "I see no image.", "text_only"),
    Turn("Thank you.", "You are welcome.", "text_only"),
)
"""What the model knows to say without an image."""


PICTURES: tuple[str, ...] = ("scene", "busy", "object", "page", "chart")
"""Kinds of pictures: flat scenes, scenes on photographs and textures, objects on them, print, charts."""

SCENES_ONLY: Mapping[str, float] = {"scene": 1.0}
"""What the first edition was trained on, and is measured on."""

TRAINING_PICTURES: Mapping[str, float] = {"scene": 0.35, "busy": 0.11, "object": 0.33, "page": 0.17, "chart": 0.04}
"""How often training shows each kind of picture."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image with the truth behind it, and questions about it."""

    image: Image.Image
    picture: str
    """One of `PICTURES`."""
    size: tuple[int, int]
    """Width and height that marks are counted in; the image may be a multiple of it."""
    marks: tuple[Mark, ...]
    """What is where."""
    turns: tuple[Turn, ...]
    scene: Scene | None = None
    """Of `scene` and `busy`."""


def example_rng(split: Split, seed: int, index: int) -> random.Random:
    """The source of chance of one example: another one for every split, seed and index."""
    return random.Random(f"{split}/{seed}/{index}")


def generate_example(
    rng: random.Random, split: Split, num_turns: int = 6, pictures: Mapping[str, float] = SCENES_ONLY
) -> Example:
    """Draw an image and ask about it.

    Args:
        rng: the only source of chance; see `example_rng`.
        split: whose handwritten digits, words, objects, photographs and charts may appear.
        num_turns: questions to ask, at least 1.
        pictures: how often each kind of picture comes.
    """
    picture = rng.choices(list(pictures), list(pictures.values()))[0] if len(pictures) > 1 else next(iter(pictures))
    if picture in ("scene", "busy"):
        return _scene_example(rng, split, num_turns, is_busy=picture == "busy")
    sample, ask = _SAMPLED[picture]
    content: Any = sample(rng, split)
    turns = tuple(ask(rng, content, num_turns))
    return Example(content.draw(), picture, content.size, content.marks, turns)


def _scene_example(rng: random.Random, split: Split, num_turns: int, is_busy: bool) -> Example:
    while True:
        scene = sample_scene(rng, split)
        turns = ask_questions(rng, scene, num_turns, split)
        if turns:
            break
    scale = 2 if rng.random() < 0.1 else 1  # larger than its canvas: the processor shrinks it
    size, marks = (scene.width, scene.height), scene_marks(scene)
    if not is_busy:
        return Example(render(scene, scale), "scene", size, marks, tuple(turns), scene)
    image = render(scene, scale, sample_backdrop(rng, split))
    return Example(image, "busy", size, marks, tuple(replace(turn, kind="busy") for turn in turns), scene)


_SAMPLED: dict[str, tuple[Callable[[random.Random, Split], Any], Callable[[random.Random, Any, int], list[Turn]]]] = {
    "object": (sample_object_picture, ask_object_questions),
    "page": (sample_page, ask_page_questions),
    "chart": (sample_chart, ask_chart_questions),
}


def which_image(rng: random.Random, first: Scene, second: Scene) -> Turn | None:
    """A question that two images decide together, or None where both or neither show the thing.

    Args:
        rng: the only source of chance.
        first: what the first image shows.
        second: what the second image shows.
    """
    shown = [{name for thing in scene.things for name in (thing.name, thing.shape)} for scene in (first, second)]
    deciding = sorted(shown[0] ^ shown[1])
    if not deciding:
        return None
    name = rng.choice(deciding)
    return Turn(
        f"Which image shows a {name}, the first or the second?",
        "first" if name in shown[0] else "second",
        "two_images",
    )
