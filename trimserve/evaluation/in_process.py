"""Answers from a model in this process: the fast way, with exact divergences.

Goes past the engine: an image is encoded once for all questions and settings that follow each other on it, and
prompts are read, and tokens decoded, for many settings together. Greedy tokens are those that a server gives.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest
from trimserve.engine.memory import available_bytes
from trimserve.errors import InvalidRequest, RequestFailed
from trimserve.evaluation.answers import UNTRIMMED, Answer
from trimserve.evaluation.dataset import DatasetError, Question
from trimserve.evaluation.metrics import cosine, kl_divergence
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.decoder import SequenceRows
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan, max_rows

__all__ = ["InProcess", "prepare_question"]


@dataclass(slots=True)
class _Run:
    """One question under one setting."""

    source: str
    """Of the question, for errors."""
    prompt: PreparedPrompt
    rows: SequenceRows
    kv: OwnKeyValues
    num_valid: int
    max_new_tokens: int
    num_held: int = 0
    logits: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """[vocab_size], of the first token, less their mean."""
    logprobs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """[vocab_size], of the first token."""
    token_ids: list[int] = field(default_factory=list)


class InProcess:
    """A loaded model as an `Answerer`."""

    def __init__(self, model: Mllama, *, batch: int = 64, adapter: Path | None = None) -> None:
        """Borrow a model.

        Args:
            model: nothing else uses it meanwhile.
            batch: about how many settings of questions run together, at least 1; all settings of a question do.
            adapter: folder of the LoRA adapter that answers; None is the base model.
        Raises:
            AdapterError: the adapter cannot be used with the model.
        """
        self._model = model
        self._batch = batch
        self._adapter = None if adapter is None else model.load_adapter(adapter)
        self._adapter_folder = adapter
        self._pool = OwnPages(model.info, available_bytes(model.info.device) // 2)
        self._end_token_ids = frozenset(model.info.generation_defaults.eos_token_ids)
        self._encoded: tuple[Path, frozenset[Observation], list[EncodedImage]] | None = None

    @property
    def policies(self) -> Sequence[str]:
        """See `Answerer.policies`."""
        return tuple(policy.name for policy in self._model.info.policy_details if policy.is_available)

    def describe(self) -> dict[str, Any]:
        """The model, for reports."""
        info = self._model.info
        return {
            "model": info.model_id,
            "revision": info.revision,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "through": "this process",
            **({} if self._adapter_folder is None else {"adapter": str(self._adapter_folder)}),
        }

    def answers(
        self, questions: Iterable[Question], trims: Sequence[TrimRequest], *, max_new_tokens: int | None = None
    ) -> Iterator[list[Answer]]:
        """See `Answerer.answers`."""
        remaining = iter(questions)
        settings = (UNTRIMMED, *trims)
        while group := list(islice(remaining, max(1, self._batch // len(settings)))):
            runs = [run for question in group for run in self._runs(question, settings, max_new_tokens)]
            self._read(runs)
            self._decode(runs)
            for run in runs:
                run.kv.release()
            for first in range(0, len(runs), len(settings)):
                untrimmed = runs[first]
                yield [self._answer(run, untrimmed) for run in runs[first : first + len(settings)]]

    def _runs(self, question: Question, settings: Sequence[TrimRequest], max_new_tokens: int | None) -> list[_Run]:
        info = self._model.info
        prompt = prepare_question(self._model, question)
        room = info.max_model_len - len(prompt.token_ids)
        limit = min(room, max_new_tokens or info.generation_defaults.max_new_tokens)
        needs = frozenset[Observation]().union(*(TrimPlan.of(trim).needs for trim in settings))
        if self._encoded is None or self._encoded[0] != question.image or self._encoded[1] != needs:
            encoded = [run_through(self._model.encode_image(image, needs, self._adapter)) for image in prompt.images]
            for image in encoded:
                image.max_choices = len(settings)
            self._encoded = question.image, needs, encoded
        images = self._encoded[2]
        runs = []
        for trim in settings:
            plan, counts = TrimPlan.of(trim), [image.num_features for image in images]
            most_rows = sum(max_rows(count, info.num_heads, info.features_per_tile, plan) for count in counts)
            kv = self._pool.key_values(len(prompt.token_ids) + limit, most_rows)
            kv.adapter = self._adapter
            rows = self._model.prompt_rows(prompt, images, plan, kv)
            runs.append(_Run(_source(question), prompt, rows, kv, sum(counts), limit))
        return runs

    def _read(self, runs: Sequence[_Run]) -> None:
        """Prefill all together and take the first tokens."""
        token_ids = list(chain.from_iterable(run.prompt.token_ids for run in runs))
        logits = self._model.logits([run.rows for run in runs], token_ids, all_rows=False).double()
        for run in runs:
            run.kv.give_back_unused()
        # Less their mean, which softmax ignores.
        rows = (logits - logits.mean(dim=-1, keepdim=True)).cpu().numpy()
        logprobs = logits.log_softmax(dim=-1).cpu().numpy()
        for run, row, logprob, token_id in zip(runs, rows, logprobs, logits.argmax(dim=-1).tolist(), strict=True):
            assert run.rows.vision is not None
            if not np.isfinite(logprob).all():
                raise RequestFailed(f"{run.source}: the model's logits are not finite")
            run.num_held = sum(run.rows.vision.layer_rows[0])
            run.logits, run.logprobs = row, logprob
            run.token_ids.append(token_id)

    def _decode(self, runs: Sequence[_Run]) -> None:
        while running := [run for run in runs if not self._has_ended(run)]:
            logits = self._model.decode([run.token_ids[-1] for run in running], [run.kv for run in running])
            for run, token_id in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
                run.token_ids.append(token_id)

    def _has_ended(self, run: _Run) -> bool:
        return run.token_ids[-1] in self._end_token_ids or len(run.token_ids) >= run.max_new_tokens

    def _answer(self, run: _Run, untrimmed: _Run) -> Answer:
        ended = run.token_ids[-1] in self._end_token_ids
        token_ids = run.token_ids[:-1] if ended else run.token_ids  # some checkpoints end at tokens that have a text
        return Answer(
            text=self._model.tokenizer.decode(token_ids, skip_special_tokens=True),
            num_valid=run.num_valid,
            num_held=run.num_held,
            divergence=kl_divergence(untrimmed.logprobs, run.logprobs),
            similarity=cosine(untrimmed.logits, run.logits),
        )


def prepare_question(model: Mllama, question: Question) -> PreparedPrompt:
    """A question as a user's message.

    Raises:
        DatasetError: the model refuses its image or text.
    """
    parts = (ImageFile(question.image.read_bytes()), Text(question.text))
    try:
        return model.prepare(ChatPrompt((Message("user", parts),)))
    except InvalidRequest as error:
        raise DatasetError(f"{_source(question)}: {error.message}") from error


def _source(question: Question) -> str:
    return question.source or str(question.image)
