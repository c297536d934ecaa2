"""Asks the untrimmed model: its greedy answers and the distribution behind every token, written down as lessons."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trimserve.distillation.lessons import LessonWriter, Origin
from trimserve.engine.memory import available_bytes
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.evaluation.dataset import Question, describe_questions
from trimserve.evaluation.in_process import prepare_question
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.decoder import SequenceRows
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

__all__ = ["MAX_ANSWER", "origin_of", "write_lessons"]

MAX_ANSWER: Final = 64
"""Tokens of an answer that are learned from: each is as many float16 as the vocabulary."""

_BATCH: Final = 32


def origin_of(model: Mllama, intermediate_features: str, questions: Sequence[Question]) -> Origin:
    """What a cache of these questions is made of; reads the image files."""
    info = model.info
    data = f"{describe_questions(questions)['sha256']} {MAX_ANSWER}"
    return Origin(
        model_id=info.model_id,
        model_revision=info.revision,
        intermediate_features=intermediate_features,
        dtype=info.dtype,
        data=hashlib.sha256(data.encode()).hexdigest(),
        width=info.hidden_size,
        features_per_tile=info.features_per_tile,
        vocab_size=info.vocab_size,
    )


def write_lessons(
    folder: Path, model: Mllama, questions: Sequence[Question], origin: Origin, on_question: Callable[[], None]
) -> None:
    """Ask every question and write the cache.

    Args:
        folder: of the cache.
        model: nothing else uses it meanwhile.
        questions: those on one image follow each other.
        origin: of the cache.
        on_question: called after each.
    """
    pool = OwnPages(model.info, available_bytes(model.info.device) // 4)
    remaining = iter(questions)
    image, number, encoded = None, -1, None
    with LessonWriter(folder, origin) as writer:
        while group := list(islice(remaining, _BATCH)):
            asked = []
            for question in group:
                prompt = prepare_question(model, question)
                if encoded is None or question.image != image:
                    image, encoded = question.image, run_through(model.encode_image(prompt.images[0]))
                    number = writer.add_image(encoded.features)
                asked.append(_Asked.of(model, pool, prompt, number, encoded))
            for each in _answered(model, asked):
                writer.add(each.image, each.prompt.token_ids, each.answer, each.first_seeing, each.said)
                on_question()


@dataclass(slots=True)
class _Asked:
    prompt: PreparedPrompt
    image: int
    rows: SequenceRows
    kv: OwnKeyValues
    most_tokens: int
    answer: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: Mllama, pool: OwnPages, prompt: PreparedPrompt, image: int, encoded: EncodedImage) -> "_Asked":
        """A prompt that is to be answered, with room for its longest answer."""
        info, num_prompt = model.info, len(prompt.token_ids)
        most = min(info.max_model_len - num_prompt, info.generation_defaults.max_new_tokens, MAX_ANSWER)
        kv = pool.key_values(num_prompt + most, encoded.num_features)
        return cls(prompt, image, model.prompt_rows(prompt, [encoded], TrimPlan.of(UNTRIMMED), kv), kv, most)

    @property
    def first_seeing(self) -> int:
        """The first row that sees the image."""
        assert self.rows.vision is not None
        [(first, _, _, _)] = self.rows.vision.visible_runs()
        return first

    @property
    def said(self) -> Tensor:
        """Log-probabilities of the answer, float16 [tokens, vocab_size]."""
        return torch.stack(self.logprobs)

    def take(self, logits: Tensor) -> None:
        """Note the log-probabilities of logits [vocab_size], and take the likeliest token."""
        self.logprobs.append(logits.log_softmax(dim=-1).half())
        self.answer.append(int(logits.argmax()))

    def has_ended(self, ends: frozenset[int]) -> bool:
        """Whether the answer is whole, or as long as it may be."""
        return self.answer[-1] in ends or len(self.answer) >= self.most_tokens


def _answered(model: Mllama, asked: Sequence[_Asked]) -> Iterator[_Asked]:
    ends = frozenset(model.info.generation_defaults.eos_token_ids)
    token_ids = list(chain.from_iterable(each.prompt.token_ids for each in asked))
    running, logits = [*asked], model.logits([each.rows for each in asked], token_ids, all_rows=False)
    while running:
        for each, own in zip(running, logits, strict=True):
            each.take(own)
        running = [each for each in running if not each.has_ended(ends)]
        if running:
            logits = model.decode([each.answer[-1] for each in running], [each.kv for each in running])
    for each in asked:
        each.kv.release()
        yield each
