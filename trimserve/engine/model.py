"""What the engine needs of a model: the seam that `model/mllama.py` fills, and a fake in tests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ImageFile, Prompt
from trimserve.engine.kv_pool import SequenceKV
from trimserve.model.interruptible import Interruptible
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt, TokenizedPrompt
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan

if TYPE_CHECKING:  # loads transformers, which the engine does without
    from trimserve.model.images import PreparedImage

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

    def prepare_image(self, image: ImageFile) -> "PreparedImage":
        """Decode one image; slow, pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: bad image.
        """

    def encode_image(
        self, image: "PreparedImage", needs: frozenset[Observation] = frozenset()
    ) -> Interruptible[EncodedImage]:
        """Visual features of an image, and what else is needed."""

    def prefill(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, kv: SequenceKV
    ) -> Interruptible[Prefilled]:
        """Run the prompt, fill `kv` and return the logits that follow it."""

    def warm_up_decode(self, pages: Tensor, max_batch: int) -> None:
        """Make decode steps ready for up to `max_batch` sequences with KV in `pages`."""

    def decode(self, token_ids: Sequence[int], kvs: Sequence[SequenceKV]) -> Tensor:
        """One step of several sequences: float32 logits [B, vocab_size], each sequence's `kv` one longer.

        The logits hold until the next step.
        """
