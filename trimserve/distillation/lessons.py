"""What a model said of each question, on disk: features of the images, greedy answers, and how likely each token was.

A cache is written once for a model and a data set, and serves the training of every method. It is read through memory
maps, so memory holds one batch however long the data set is. Files are raw: nothing of another origin is opened.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import torch
from torch import Tensor

from trimserve.evaluation.dataset import DatasetError

__all__ = ["Lesson", "LessonWriter", "Lessons", "Origin"]

_FEATURES: Final = "features.bin"
_LOGPROBS: Final = "logprobs.bin"
_INDEX: Final = "lessons.json"
"""Written last: a cache without it is begun anew."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a cache was made of; equal ones make equal caches."""

    model_id: str
    model_revision: str
    intermediate_features: str
    dtype: str
    data: str
    """Hash of questions and images."""
    width: int
    """D, of a feature."""
    features_per_tile: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """One question about one image, and its answer."""

    image: int
    """Which one."""
    token_ids: tuple[int, ...]
    """Of prompt and answer."""
    num_prompt: int
    first_seeing: int
    """First row that sees the image."""

    @property
    def num_answer(self) -> int:
        """Tokens of the answer, its end included."""
        return len(self.token_ids) - self.num_prompt


class Lessons:
    """A finished cache."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        """Open it.

        Args:
            folder: of the cache.
            origin: that it must have.
        Raises:
            DatasetError: there is none, or it is of another model or other data.
        """
        try:
            index = json.loads((folder / _INDEX).read_text())
        except (OSError, ValueError) as error:
            raise DatasetError(f"cache {folder}: cannot be read: {error}") from error
        for name, wanted in asdict(origin).items():
            if index["origin"].get(name) != wanted:
                raise DatasetError(f"cache {folder}: has {name} {index['origin'].get(name)}, must have {wanted}")
        self.origin = origin
        self.lessons = [Lesson(**{**each, "token_ids": tuple(each["token_ids"])}) for each in index["lessons"]]
        """In the order of the questions."""
        self.num_tiles: list[int] = index["num_tiles"]
        """Of each image."""
        self._first_tile = [0, *accumulate(self.num_tiles)]
        self._first_answer = [0, *accumulate(lesson.num_answer for lesson in self.lessons)]
        dtype: torch.dtype = getattr(torch, origin.dtype)
        tile = (origin.features_per_tile, origin.width)
        self._features = _mapped(folder / _FEATURES, dtype, (self._first_tile[-1], *tile))
        self._logprobs = _mapped(folder / _LOGPROBS, torch.float16, (self._first_answer[-1], origin.vocab_size))

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder has a finished cache, of whatever origin."""
        return (folder / _INDEX).exists()

    def tiles(self, image: int) -> Tensor:
        """Features of an image, [tiles, F, D]."""
        return self._features[self._first_tile[image] : self._first_tile[image + 1]]

    def logprobs(self, lesson: int) -> Tensor:
        """What the untrimmed model said, float16 [answer tokens, V], natural logarithms."""
        return self._logprobs[self._first_answer[lesson] : self._first_answer[lesson + 1]]


class LessonWriter:
    """A cache in the making; images come before their questions."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        """Begin.

        Args:
            folder: made if it is not there; what an interrupted writer left in it is overwritten.
            origin: of the cache.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._origin = origin
        self._lessons: list[Lesson] = []
        self._num_tiles: list[int] = []
        self._features = (folder / _FEATURES).open("wb")
        self._logprobs = (folder / _LOGPROBS).open("wb")

    def add_image(self, features: Tensor) -> int:
        """Write features [N, D]; returns the image's number."""
        _write(self._features, features)
        self._num_tiles.append(len(features) // self._origin.features_per_tile)
        return len(self._num_tiles) - 1

    def add(self, image: int, prompt: Sequence[int], answer: Sequence[int], first_seeing: int, said: Tensor) -> None:
        """Write a lesson.

        Args:
            image: its number.
            prompt: token ids.
            answer: token ids.
            first_seeing: first row of the prompt that sees the image.
            said: float [answer tokens, V], logarithms of probabilities.
        """
        _write(self._logprobs, said.half())
        self._lessons.append(Lesson(image, (*prompt, *answer), len(prompt), first_seeing))

    def __enter__(self) -> "LessonWriter":
        """Write within a `with` block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Close the files; the cache is there if nothing failed."""
        self._features.close()
        self._logprobs.close()
        if kind is None:
            index = {
                "origin": asdict(self._origin),
                "num_tiles": self._num_tiles,
                "lessons": [asdict(lesson) for lesson in self._lessons],
            }
            (self._folder / _INDEX).write_text(json.dumps(index))


def _write(file: BinaryIO, rows: Tensor) -> None:
    file.write(rows.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count, size = torch.Size(shape).numel(), file.stat().st_size
    if size != count * dtype.itemsize:
        raise DatasetError(f"cache {file}: must have {count * dtype.itemsize} bytes, got {size}")
    return torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(shape)
