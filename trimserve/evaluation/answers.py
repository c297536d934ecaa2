"""What an evaluation asks for and gets, whoever answers: a model in this process or a server."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimserve.api.trim import TrimRequest
from trimserve.evaluation.dataset import Question

__all__ = ["UNTRIMMED", "Answer", "Answerer"]

UNTRIMMED = TrimRequest(enabled=False)
"""What everything is compared with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One question answered under one way of trimming."""

    text: str
    num_valid: int
    """Visual features of the image."""
    num_held: int
    """Rows that they came to: kept features and merged ones."""
    divergence: float
    """KL(untrimmed || this) of the first generated token's distribution, in nats; 0 when untrimmed."""
    similarity: float | None = None
    """Cosine between the logits of that token and the untrimmed ones, each less their mean, in [-1, 1]; None: a server
    tells no logits."""


class Answerer(Protocol):
    """Answers greedily: the largest logit, no penalties."""

    @property
    def policies(self) -> Sequence[str]:
        """Names that `TrimRequest.policy` takes here: those whose knob is set, or that need none."""

    def describe(self) -> dict[str, Any]:
        """The model and how it is reached, for reports."""

    def answers(
        self, questions: Iterable[Question], trims: Sequence[TrimRequest], *, max_new_tokens: int | None = None
    ) -> Iterator[list[Answer]]:
        """Answer questions under several ways of trimming.

        Args:
            questions: read as answers are taken.
            trims: the ways; each can drop features.
            max_new_tokens: at least 1; None is the checkpoint's default.
        Yields:
            For each question, in order: the untrimmed answer, then one for each of `trims`.
        Raises:
            DatasetError: the model refuses a question's image or text.
            RequestFailed: logits that are not finite, of which no divergence could be told.
        """
