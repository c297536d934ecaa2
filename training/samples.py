"""Writes the sample images that the package ships: `python -m training.samples`.

Held-out examples, the first ones that show what each sample is for. `samples.json` has questions and true
answers.
"""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

from training.examples import Example, example_rng, generate_example
from training.export import CHECKPOINT
from training.scenes import TILE_SIZE, Scene

__all__ = ["SAMPLES", "main", "write_samples"]

_SEED = 2026


def _tiles(scene: Scene) -> tuple[float, float]:
    return scene.height / TILE_SIZE, scene.width / TILE_SIZE


SAMPLES: dict[str, tuple[Callable[[Scene], bool], tuple[str, ...]]] = {
    "scene": (
        lambda s: _tiles(s) == (2, 2) and len(s.things) == 4 and s.writing is None,
        ("position", "colour"),
    ),
    "wide": (
        lambda s: _tiles(s) == (1, 4) and len(s.things) == 5 and s.writing is None,
        ("description", "count"),
    ),
    "tall": (
        lambda s: _tiles(s) == (3, 1) and len(s.things) == 3 and s.writing is None,
        ("description", "yes_no"),
    ),
    "digits": (
        lambda s: s.writing is not None and s.writing.is_number and len(s.writing.text) == 4,
        ("digits",),
    ),
    "word": (
        lambda s: s.writing is not None and not s.writing.is_number and not s.things,
        ("word", "colour"),
    ),
    "mixed": (
        lambda s: _tiles(s) == (2, 2) and s.writing is not None and len(s.writing.text) == 3 and len(s.things) == 3,
        ("shape", "description"),
    ),
}
"""What each sample shows and which kinds of questions go with it."""


def write_samples(folder: Path) -> None:
    """Write the images and `samples.json`; the same files every time.

    Args:
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for name, (wanted, kinds) in SAMPLES.items():
        example = _first(wanted, kinds)
        example.image.save(folder / f"{name}.png", optimize=True)
        for kind in kinds:
            turn = next(turn for turn in example.turns if turn.kind == kind)
            listed.append({"file": f"{name}.png", "kind": kind, "question": turn.question, "answer": turn.answer})
    (folder / "samples.json").write_text(json.dumps(listed, indent=2) + "\n")


def main() -> None:
    """Command line: write the samples into the package."""
    write_samples(CHECKPOINT.parent / "samples")


def _first(wanted: Callable[[Scene], bool], kinds: tuple[str, ...]) -> Example:
    for index in count():
        example = generate_example(example_rng("held_out", _SEED, index), "held_out", num_turns=12)
        assert example.scene is not None  # generate_example draws scenes unless it is told otherwise
        is_drawn_as_it_is = example.image.size == example.size
        if wanted(example.scene) and is_drawn_as_it_is and {turn.kind for turn in example.turns} >= set(kinds):
            return example
    raise AssertionError("the generator never ends")


if __name__ == "__main__":
    main()
