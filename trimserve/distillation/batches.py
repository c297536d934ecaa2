"""Lessons as padded batches, in an order that is drawn once for each pass over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimserve.distillation.lessons import Lessons

__all__ = ["LessonBatch", "batch_of", "epoch_order"]

_SORTED: Final = 16
"""Batches that are drawn together."""

_SEEDS_APART: Final = 100_003
"""More epochs than anybody trains."""


@dataclass(frozen=True, slots=True)
class LessonBatch:
    """B lessons; t tiles of all their images."""

    token_ids: Tensor
    """int64 [B, T]; padding is behind."""
    sees: Tensor
    """bool [B, T], rows that see the image."""
    asks: Tensor
    """bool [B, T], of these the rows of the prompt."""
    wanted: Tensor
    """bool [B, T], rows whose logits are the answer's."""
    said: Tensor
    """float32 [wanted rows, V], the untrimmed model's logarithms of probabilities."""
    tiles: Tensor
    """[t, F, D]"""
    lesson_of: Tensor
    """int64 [t], the lesson of each tile."""
    place: Tensor
    """int64 [t], which tile of its image it is."""


def batch_of(lessons: Lessons, numbers: Sequence[int], device: torch.device) -> LessonBatch:
    """Read some lessons.

    Args:
        lessons: all of them.
        numbers: which, at least one.
        device: where the batch goes.
    """
    chosen = [lessons.lessons[number] for number in numbers]
    rows = [torch.arange(len(each.token_ids)) for each in chosen]
    images = [lessons.tiles(each.image) for each in chosen]
    lesson_of = [torch.full((len(tiles),), index) for index, tiles in enumerate(images)]

    def padded(of: list[Tensor]) -> Tensor:
        """Rows of different lengths as one tensor, zeros behind the shorter ones."""
        return pad_sequence(of, batch_first=True).to(device)

    pairs = [*zip(chosen, rows, strict=True)]
    sees = padded([row >= each.first_seeing for each, row in pairs])
    return LessonBatch(
        # The last token of an answer is nobody's context.
        token_ids=padded([torch.tensor(each.token_ids) for each in chosen]),
        sees=sees,
        asks=sees & padded([row < each.num_prompt for each, row in pairs]),
        wanted=padded([(row >= each.num_prompt - 1) & (row < len(row) - 1) for each, row in pairs]),
        said=torch.cat([lessons.logprobs(number) for number in numbers]).to(device, torch.float32),
        tiles=torch.cat(images).to(device),
        lesson_of=torch.cat(lesson_of).to(device),
        place=torch.cat([torch.arange(len(tiles)) for tiles in images]).to(device),
    )


def epoch_order(lengths: Mapping[int, int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one pass; what is left over, less than a batch, is not asked in it.

    Texts of a batch are about equally long, so that little of it is padding: every few batches are drawn together and
    sorted among themselves.

    Args:
        lengths: tokens of each lesson, by its number.
        batch: B.
        seed: of the training.
        epoch: which pass; each has an order of its own.
    """
    generator = torch.Generator().manual_seed(seed * _SEEDS_APART + epoch)
    numbers = [*lengths]
    drawn = [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]
    drawn = drawn[: len(drawn) // batch * batch]
    batches = []
    for first in range(0, len(drawn), _SORTED * batch):
        alike = sorted(drawn[first : first + _SORTED * batch], key=lengths.__getitem__)
        batches += [alike[start : start + batch] for start in range(0, len(alike), batch)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
