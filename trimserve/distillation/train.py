"""The training loop: seeded, and resumed from its own state file to the same weights, bit for bit.

What is drawn depends on the seed and the step only, and every few steps weights, moments and curve are saved. The same
machine and number of threads are taken for granted; on a GPU, sums may differ in their last bits.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Final

import torch

from trimserve.distillation.batches import LessonBatch, batch_of, epoch_order
from trimserve.distillation.lessons import Lessons
from trimserve.distillation.students import Student
from trimserve.errors import CheckpointError
from trimserve.evaluation.dataset import DatasetError
from trimserve.model.trained_file import Progress

__all__ = ["Recipe", "split", "train"]

_TESTED: Final = 20
"""Every so manieth image is not learned from."""

_MOST_TESTED: Final = 128
"""Questions that a point of the curve asks."""

_POINTS: Final = 10
"""Of the curve."""

_SAVED_EVERY: Final = 50
"""Steps."""

_WARM_UP: Final = 0.05
"""Share of the steps in which the learning rate rises; then it falls to 0 by a cosine."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the outcome beside model and data."""

    method: str
    rows: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    data: str
    """`Origin.data` of the lessons."""
    model_revision: str


def split(lessons: Lessons) -> tuple[list[int], list[int]]:
    """Numbers of the lessons that are learned from, and of those that the curve is measured on; by image.

    Raises:
        DatasetError: there is only one image.
    """
    tested = [n for n, each in enumerate(lessons.lessons) if each.image % _TESTED == 1]
    if not tested:
        raise DatasetError("must have questions about at least 2 images, got 1")
    learned = [n for n, each in enumerate(lessons.lessons) if each.image % _TESTED != 1]
    return learned, tested[:_MOST_TESTED]


def train(
    student: Student,
    lessons: Lessons,
    recipe: Recipe,
    state_file: Path,
    device: torch.device,
    on_step: Callable[[], None],
) -> list[Progress]:
    """Train a student's module in place.

    Args:
        student: its module is fresh, drawn by the recipe's seed.
        lessons: to learn from.
        recipe: how; `batch` is at most the lessons that are learned from.
        state_file: where to go on, if it is there; the caller removes it in the end.
        device: of the module.
        on_step: called after each step, those before an interruption included.
    Returns:
        The curve.
    Raises:
        CheckpointError: the state file is of another recipe, or broken.
    """
    learned, tested = split(lessons)
    optimizer = torch.optim.AdamW(student.module.parameters(), recipe.learning_rate, weight_decay=0.0)
    first, curve = _resumed(student, optimizer, recipe, state_file)
    for _ in range(first):
        on_step()
    if not curve:
        curve.append(_measured(student, lessons, tested, recipe.batch, 0, device))
    lengths = {number: len(lessons.lessons[number].token_ids) for number in learned}
    for step, numbers in enumerate(_batches(lengths, recipe, first), start=first):
        _step(student, optimizer, batch_of(lessons, numbers, device), _rate(step, recipe))
        done = step + 1
        if done * _POINTS // recipe.steps > step * _POINTS // recipe.steps:
            curve.append(_measured(student, lessons, tested, recipe.batch, done, device))
        if done % _SAVED_EVERY == 0:
            _save(student, optimizer, recipe, done, curve, state_file)
        on_step()
    return curve


def _batches(lengths: Mapping[int, int], recipe: Recipe, first: int) -> Iterator[list[int]]:
    """Of the steps from `first` on."""
    per_epoch = len(lengths) // recipe.batch
    epoch, skipped = divmod(first, per_epoch)
    left = recipe.steps - first
    while left > 0:
        for numbers in epoch_order(lengths, recipe.batch, recipe.seed, epoch)[skipped : skipped + left]:
            left -= 1
            yield numbers
        epoch, skipped = epoch + 1, 0


def _rate(step: int, recipe: Recipe) -> float:
    warm = max(1, round(_WARM_UP * recipe.steps))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm))) / 2


def _step(student: Student, optimizer: torch.optim.Optimizer, batch: LessonBatch, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    student.loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(student.module.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _measured(
    student: Student, lessons: Lessons, tested: Sequence[int], batch: int, step: int, device: torch.device
) -> Progress:
    total = 0.0
    for first in range(0, len(tested), batch):
        numbers = tested[first : first + batch]
        total += float(student.loss(batch_of(lessons, numbers, device))) * len(numbers)
    return Progress(step, total / len(tested))


def _save(
    student: Student,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    curve: Sequence[Progress],
    file: Path,
) -> None:
    state = {
        "recipe": asdict(recipe),
        "weights": student.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "curve": [(each.step, each.loss) for each in curve],
    }
    new = file.with_name(f"{file.name}.new")
    torch.save(state, new)
    os.replace(new, file)


def _resumed(
    student: Student, optimizer: torch.optim.Optimizer, recipe: Recipe, file: Path
) -> tuple[int, list[Progress]]:
    """Steps that are done, and the curve up to there."""
    if not file.exists():
        return 0, []
    try:
        state = torch.load(file, weights_only=True)
        for name, wanted in asdict(recipe).items():
            if state["recipe"][name] != wanted:
                began = f"was begun with {name} {state['recipe'][name]}, is to go on with {wanted}"
                raise CheckpointError(f"{file}: {began}; remove it to begin anew")
        student.module.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], [Progress(*each) for each in state["curve"]]
    except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; remove it to begin anew") from error
