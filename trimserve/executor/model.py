"""What a local executor needs of a model: the seam that `model/mllama.py` fills, and a fake in tests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan

if TYPE_CHECKING:  # loads transformers, which the executor does without
    from trimserve.model.images import PreparedImage

__all__ = ["Model"]


class Model(Protocol):
    """An Mllama, or a fake of one. Images are only handed on from one method to the next."""

    @property
    def info(self) -> ModelInfo:
        """Geometry, limits and defaults."""

    def encode_image(
        self, image: "PreparedImage", needs: frozenset[Observation] = frozenset()
    ) -> Interruptible[EncodedImage]:
        """Visual features of an image, and what else is needed."""

    def prefill(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, kv: KeyValues
    ) -> Interruptible[Prefilled]:
        """Run the prompt, fill `kv` and return the logits that follow it."""

    def warm_up_decode(self, pages: Tensor, max_batch: int) -> None:
        """Make decode steps ready for up to `max_batch` sequences with KV in `pages`."""

    def decode(self, token_ids: Sequence[int], kvs: Sequence[KeyValues]) -> Tensor:
        """One step of several sequences: float32 logits [B, vocab_size], each sequence's `kv` one longer.

        The logits hold until the next step.
        """
