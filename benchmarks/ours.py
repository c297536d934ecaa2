"""trimserve's model without engine and service: vision, prefill and decode steps, each a call to be timed."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.load import draw_picture
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

__all__ = [
    "QUESTION",
    "SETTINGS",
    "Asked",
    "Ours",
    "Setting",
    "chat",
    "encoded",
    "recommended",
]

QUESTION: Final = "Describe what you see in a few words, and name every colour."

_MOST_TEXT: Final = 64
"""Tokens of a prompt."""
_SLACK: Final = 1.1  # of the pool: pages are whole


@dataclass(frozen=True, slots=True)
class Setting:
    """A question about an image."""

    side: int
    """Tiles along each side of the image."""
    is_trimmed: bool

    def picture(self, tile_size: int) -> bytes:
        """The image, which fills its tiles."""
        return draw_picture(random.Random(0), self.side * tile_size)


SETTINGS: Final = {"off": Setting(2, False), "default": Setting(2, True), "one_tile": Setting(1, True)}


def chat(question: str, *images: bytes) -> ChatPrompt:
    """A question of a user about images."""
    return ChatPrompt((Message("user", (*map(ImageFile, images), Text(question))),))


def recommended(info: ModelInfo, max_kept_fraction: float | None = None) -> TrimRequest:
    """How a request that names nothing is trimmed, but for a cap."""
    return TrimRequest(
        k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio, max_kept_fraction=max_kept_fraction
    )


def encoded(model: Mllama, prompt: PreparedPrompt) -> list[EncodedImage]:
    """The features of a prompt's images."""
    return [run_through(model.encode_image(image)) for image in prompt.images]


class Ours:
    """A model, and pages for some sequences of one prompt."""

    def __init__(self, model: Mllama, most: int, answer_tokens: int = 16) -> None:
        """Take pages for `most` sequences that decode together, with positions behind the prompt."""
        self.model, self.answer_tokens, info = model, answer_tokens, model.info
        of_text = info.self_kv_bytes_per_token * (_MOST_TEXT + answer_tokens)
        of_image = info.cross_kv_bytes_per_feature * info.max_tiles * info.features_per_tile
        self.pool = OwnPages(info, int((most + 1) * (of_text + of_image) * _SLACK) + 2**24)

    @classmethod
    def load(cls, folder: Path, most: int, answer_tokens: int = 16, **knobs: Any) -> "Ours":
        """Load a checkpoint; `knobs` are those of `ModelConfig`."""
        return cls(load_model(ModelConfig(model=str(folder), **knobs), EngineConfig()), most, answer_tokens)

    def ask(self, setting: Setting, max_kept_fraction: float | None = None) -> "Asked":
        """Encode and prefill a setting, whose trimming has a cap."""
        info = self.model.info
        prompt = self.model.prepare(chat(QUESTION, setting.picture(info.tile_size)))
        trim = recommended(info, max_kept_fraction) if setting.is_trimmed else UNTRIMMED
        return Asked(self, prompt, trim)


class Asked:
    """One prompt about one image, prefilled."""

    def __init__(self, ours: Ours, prompt: PreparedPrompt, trim: TrimRequest) -> None:
        """Encode the image of a prompt of at most 64 tokens, and prefill."""
        self._model, self._pool, self._trim = ours.model, ours.pool, TrimPlan.of(trim)
        self.prompt, self._num_positions = prompt, len(prompt.token_ids) + ours.answer_tokens
        self._images = [self.encode()]
        self._kvs: list[OwnKeyValues] = []
        self.logits = self._prefill().logits

    @property
    def cross_rows(self) -> int:
        """Visual features that are held, and rows that others were merged into."""
        return self._kvs[0].cross_lengths[0]

    def encode(self) -> EncodedImage:
        """The image's features."""
        return run_through(self._model.encode_image(self.prompt.images[0]))

    def prefill(self) -> None:
        """The prompt, into pages that are then given back."""
        self._prefill()
        self._kvs.pop().release()

    def step(self, batch: int) -> Callable[[], Tensor]:
        """A decode step of so many sequences that each hold the prompt in pages of their own; always the same one."""
        while len(self._kvs) < batch:
            self._kvs.append(self._copied())
        kvs = self._kvs[:batch]
        token_ids = [int(self.logits.argmax())] * batch

        def run() -> Tensor:
            for kv in kvs:
                kv.length = len(self.prompt.token_ids)
            return self._model.decode(token_ids, kvs)

        return run

    def kv_bytes(self, batch: int) -> int:
        """Keys and values that a step of a batch attends to."""
        info = self._model.info
        of_text = (len(self.prompt.token_ids) + 1) * info.self_kv_bytes_per_token
        return batch * (of_text + self.cross_rows * info.cross_kv_bytes_per_feature)

    def answer(self, num_steps: int) -> list[float]:
        """Seconds of greedy decode steps from the prompt on, one after the other, at most `answer_tokens`."""
        token_id, kv, seconds = int(self.logits.argmax()), self._kvs[0], []
        kv.length = len(self.prompt.token_ids)
        for _ in range(num_steps):
            start = time.perf_counter()
            logits = self._model.decode([token_id], [kv])
            seconds.append(time.perf_counter() - start)
            token_id = int(logits[0].argmax())
        return seconds

    def release(self) -> None:
        """Give all pages back."""
        for kv in self._kvs:
            kv.release()

    def _prefill(self) -> Prefilled:
        num_features = sum(image.num_features for image in self._images)
        kv = self._pool.key_values(self._num_positions, num_features)
        self._kvs.append(kv)
        prefilled = run_through(self._model.prefill(self.prompt, self._images, self._trim, kv))
        kv.give_back_unused()
        return prefilled

    def _copied(self) -> OwnKeyValues:
        """What the first sequence holds, in pages of another one."""
        kv, pages = self._kvs[0], self._pool.pages
        other = self._pool.key_values(self._num_positions, self.cross_rows)
        other.length, other.cross_lengths, other.cross_biases = kv.length, [*kv.cross_lengths], [*kv.cross_biases]
        for to, source in ((other.self_tables, kv.self_tables), (other.cross_tables, kv.cross_tables)):
            tables = (to, source[:, : to.shape[1]])
            here, there = (torch.from_numpy(table.ravel()).long().to(pages.device) for table in tables)
            pages[here] = pages[there]
        return other
