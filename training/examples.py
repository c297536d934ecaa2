"""One training or test example: an image and questions about it, from a seed."""

import random
from dataclasses import dataclass

from PIL import Image

from training.questions import Turn, ask_questions
from training.render import render
from training.scenes import Scene, Split, sample_scene

__all__ = ["DATA_VERSION", "TEXT_ONLY", "Example", "example_rng", "generate_example", "which_image"]

DATA_VERSION = 2
"""Rises with every change that alters what a seed generates."""

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


@dataclass(frozen=True, slots=True)
class Example:
    """An image with the truth behind it, and questions about it."""

    image: Image.Image
    scene: Scene
    scale: int
    """Image pixels per scene pixel."""
    turns: tuple[Turn, ...]


def example_rng(split: Split, seed: int, index: int) -> random.Random:
    """The source of chance of one example: another one for every split, seed and index."""
    return random.Random(f"{split}/{seed}/{index}")


def generate_example(rng: random.Random, split: Split, num_turns: int = 6) -> Example:
    """Draw an image and ask about it.

    Args:
        rng: the only source of chance; see `example_rng`.
        split: whose handwritten digits and words may appear.
        num_turns: questions to ask, at least 1.
    """
    while True:
        scene = sample_scene(rng, split)
        turns = ask_questions(rng, scene, num_turns, split)
        if turns:
            scale = 2 if rng.random() < 0.1 else 1  # larger than its canvas: the processor shrinks it
            return Example(render(scene, scale), scene, scale, tuple(turns))


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
