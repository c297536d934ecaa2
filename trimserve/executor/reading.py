"""Prompts on their way into their pages: images one at a time, then one pass for those that are ready (ADR-0021).

A pass is the first of the prompts that wait and every other one whose visual features are at hand, so nobody waits for
another one's image. It knows no plan, and nothing of what is drawn.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from trimserve.executor.drawing import Answer
from trimserve.executor.image_cache import ImageCache
from trimserve.executor.model import Model
from trimserve.executor.plan import NewSequence, PrefillTimes
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled, ToPrefill
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.policies.policy import Place

__all__ = ["Held", "PromptReader"]

_MOST_ROWS = 64
"""Generated tokens that are read again between two pauses."""


@dataclass(slots=True, eq=False)
class Held:
    """What the executor holds of a sequence."""

    new: NewSequence
    answer: Answer
    kv: KeyValues | None = None
    """None before pages are granted."""
    images: list[EncodedImage] = field(default_factory=list)
    """Those of its prompt that are encoded, until the prompt is read."""
    began_at: float | None = None
    """`time.monotonic()` when work on its prompt began."""
    encoded_at: float = 0.0
    seconds: float = 0.0
    """Spent on its prompt."""
    is_alone: bool = False
    """Whether its prompt is read without others: a pass with it broke."""

    @property
    def has_generated(self) -> bool:
        """Whether a token of its answer is known."""
        return bool(self.answer.sampling.generated_token_ids)

    @property
    def wanted(self) -> ToPrefill:
        """Its prompt for the model, once its images are encoded."""
        return ToPrefill(self.new.prompt, self.images, self.new.trim, self.pages, self.new.stored)

    @property
    def times(self) -> PrefillTimes:
        """Of its prompt, which is in its pages now."""
        assert self.began_at is not None, "it was begun before it was read"
        return PrefillTimes(self.began_at, self.encoded_at, time.monotonic())

    @property
    def pages(self) -> KeyValues:
        """Where its keys and values lie."""
        assert self.kv is not None, "pages are granted with the sequence"
        return self.kv


class PromptReader:
    """Reads one pass of prompts at a time, bit by bit."""

    def __init__(self, model: Model, images: ImageCache) -> None:
        """Nothing is read yet.

        Args:
            model: nothing else uses it meanwhile.
            images: where features are looked for, and kept.
        """
        self.members: list[Held] = []
        """Those whose prompts are being read together."""
        self._model = model
        self._images = images
        self._work: Interruptible[list[Prefilled]] | None = None
        self._waiting: Sequence[Held] = ()
        """While a piece of work is done."""

    def go_on(self, waiting: Sequence[Held]) -> list[tuple[Held, Prefilled]]:
        """Do one piece of work, such as a layer.

        Args:
            waiting: whose prompts are to be read, at least one; the first is read first.
        Returns:
            What became of the pass if it ended, else nothing.
        Raises:
            Exception: the pass broke and is forgotten; see `members`.
        """
        self._waiting = waiting
        if self._work is None:
            self._work = self._read()
        try:
            next(self._work)
        except StopIteration as end:
            self._work = None
            read = [*zip(self.members, end.value, strict=True)]
            for each in self.members:
                each.images.clear()
                # Nobody here needs the pixels any more.
                each.new = replace(each.new, prompt=PreparedPrompt(each.new.prompt.token_ids, ()))
            return read
        except BaseException:
            self._work = None
            raise
        finally:
            self._waiting = ()
        return []

    def forget(self, held: Held) -> None:
        """Write no more into a sequence's pages; what others have read with it is read again."""
        if held not in self.members:
            return
        self.members = []
        if self._work is not None:
            self._work.close()  # its frame holds features and keys, and `held` itself
            self._work = None

    def _read(self) -> Interruptible[list[Prefilled]]:
        first = self._waiting[0]
        self.members = [first]
        yield from self._encode(first)
        if first.new.shares is not None:
            yield from self._read_again(first)
            return [Prefilled(torch.empty(0), num_padding=(), num_valid=(), num_kept=())]
        if not first.is_alone:  # of those that wait now, after the images were encoded
            self.members += [each for each in self._waiting if each is not first and self._is_ready(each)]
        for each in self.members[1:]:
            yield from self._encode(each)
        for each in self.members:
            each.pages.length = 0  # a pass that was given up may have filled them
        wanted = [
            ToPrefill(each.new.prompt, each.images, each.new.trim, each.pages, each.new.stored) for each in self.members
        ]
        prefilled = yield from self._model.prefill_together(wanted)
        for each in self.members:
            yield from self._read_again(each)
        return prefilled

    def _is_ready(self, held: Held) -> bool:
        """Whether its prompt can be read without encoding an image first, for itself or for a guide."""
        if held.is_alone or held.new.shares is not None or held.new.trim.place is Place.IN_GUIDE:
            return False
        missing = held.new.prompt.images[len(held.images) :]
        keys = self._keys(held)[0]
        return all(self._images.has(keys + image.key, held.new.trim.needs) for image in missing)

    def _keys(self, held: Held) -> tuple[bytes, bytes]:
        """What distinguishes its images, and their keys and values, from those of others.

        An adapter that leaves visual features as they are shares them with the base model.
        """
        adapter = held.pages.adapter
        return (b"", b"") if adapter is None else (adapter.image_key, adapter.kv_key)

    def _encode(self, held: Held) -> Interruptible[None]:
        """Find or make the features of its images."""
        if held.began_at is None:
            held.began_at = time.monotonic()
        needs, (image_key, kv_key) = held.new.trim.needs, self._keys(held)
        for image in held.new.prompt.images[len(held.images) :]:
            key = image_key + image.key
            encoded = self._images.get(key, needs)
            if encoded is None:
                encoded = yield from self._model.encode_image(image, needs, held.pages.adapter)
                self._images.put(key, encoded)
            self._images.keep_keys_values(key, kv_key)
            held.images.append(encoded)
        held.encoded_at = time.monotonic()

    def _read_again(self, held: Held) -> Interruptible[None]:
        """Read the tokens that were drawn before the sequence was dropped; the last one is the next step's row.

        They are rows of decode steps as they were at first: they see the features that were kept, where rows of the
        prompt saw all of them.
        """
        kv = held.pages
        again = held.answer.sampling.generated_token_ids[:-1]
        for first in range(0, len(again), _MOST_ROWS):
            token_ids = again[first : first + _MOST_ROWS]
            self._model.decode(token_ids, [kv], [len(token_ids)])
            yield
