"""What the engine needs of a model: the seam that `models/mllama.py` fills, and a fake in tests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer
from torch import Tensor

from trimserve.engine.kv_pool import SequenceKV
from trimserve.models.encoded_image import EncodedImage, Observation
from trimserve.models.info import ModelInfo
from trimserve.models.interruptible import Interruptible
from trimserve.models.prefilled import Prefilled
from trimserve.models.prepared import NamedImage, PreparedPrompt, TokenizedPrompt
from trimserve.models.prompt import Prompt
from trimserve.models.trimming import TrimParams

if TYPE_CHECKING:  # loads transformers, which the engine does without
    from trimserve.models.images import PreparedImage

__all__ = ["Model", "Prefilled", "PreparedPrompt"]


class Model(Protocol):
    """An Mllama, or a fake of one. Images are only handed on from one method to the next."""

    @property
    def info(self) -> ModelInfo:
        """Geometry, limits and defaults."""

    @property
    def tokenizer(self) -> Tokenizer:
        """For incremental detokenisation."""

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenise, decode no image; quick, pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: image count or size, empty or too long prompt.
        """

    def prepare_image(self, image: NamedImage) -> "PreparedImage":
        """Decode one image; slow, pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: bad image.
        """

    def encode_image(
        self, image: "PreparedImage", needs: frozenset[Observation] = frozenset()
    ) -> Interruptible[EncodedImage]:
        """Visual features of an image, and what else is needed."""

    def prefill(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimParams, kv: SequenceKV
    ) -> Interruptible[Prefilled]:
        """Run the prompt, fill `kv` and return the logits that follow it."""

    def warm_up_decode(self, pages: Tensor, max_batch: int) -> None:
        """Make decode steps ready for up to `max_batch` sequences with KV in `pages`."""

    def decode(self, token_ids: Sequence[int], kvs: Sequence[SequenceKV]) -> Tensor:
        """One step of several sequences: float32 logits [B, vocab_size], each sequence's `kv` one longer.

        The logits hold until the next step.
        """
