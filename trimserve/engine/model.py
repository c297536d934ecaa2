"""What the engine needs of a model: the seam that `models/mllama.py` fills, and a fake in tests."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer
from torch import Tensor

from trimserve.engine.kv_pool import SequenceKV
from trimserve.models.info import ModelInfo
from trimserve.models.prefilled import Prefilled
from trimserve.models.prompt import Prompt
from trimserve.models.trimming import TrimParams

__all__ = ["Model", "Prefilled", "PreparedPrompt"]


class PreparedPrompt(Protocol):
    """A tokenised prompt with decoded images."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The prompt as the model reads it, at least one id."""

    @property
    def images(self) -> Sequence[Any]:
        """One entry per image; the engine only counts them."""


Prompted = TypeVar("Prompted", bound=PreparedPrompt)


class Model(Protocol[Prompted]):
    """An Mllama, or a fake of one. What `prepare` returns, the engine only hands on."""

    @property
    def info(self) -> ModelInfo:
        """Geometry, limits and defaults."""

    @property
    def tokenizer(self) -> Tokenizer:
        """For incremental detokenisation."""

    def prepare(self, prompt: Prompt) -> Prompted:
        """Tokenise and decode images; pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: bad image, image count, empty or too long prompt.
        """

    def encode_images(self, prompt: Prompted) -> list[Tensor]:
        """Visual features of each image, [tiles * features_per_tile, hidden_size], real tiles only."""

    def prefill(self, prompt: Prompted, features: Sequence[Tensor], trim: TrimParams, kv: SequenceKV) -> Prefilled:
        """Run the prompt, fill `kv` and return the logits that follow it."""

    def decode(self, token_ids: Sequence[int], kvs: Sequence[SequenceKV]) -> Tensor:
        """One step of several sequences: float32 logits [B, vocab_size], each sequence's `kv` one longer."""
