"""What a local executor needs of a model: the seam that `model/mllama.py` fills, and a fake in tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.model.adapters import Adapter
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled, ToPrefill
from trimserve.model.prepared import PreparedImage
from trimserve.trimming.encoded_image import EncodedImage, Observation

__all__ = ["Model"]


class Model(Protocol):
    """An Mllama, or a fake of one. Images are only handed on from one method to the next."""

    @property
    def info(self) -> ModelInfo:
        """Geometry, limits and defaults."""

    @property
    def tokenizer(self) -> Tokenizer:
        """By which constraints know the text of a token."""

    def load_adapter(self, folder: Path) -> Adapter:
        """Read an adapter; another thread may compute meanwhile.

        Raises:
            AdapterError: it cannot be used with this model.
        """

    def forget_adapter(self, adapter: Adapter) -> None:
        """Hold nothing of an adapter any more; no sequence may have it."""

    def encode_image(
        self, image: PreparedImage, needs: frozenset[Observation] = frozenset(), adapter: Adapter | None = None
    ) -> Interruptible[EncodedImage]:
        """Visual features of an image, as the base model or an adapter sees it, and what else is needed."""

    def prefill_together(self, prompts: Sequence[ToPrefill]) -> Interruptible[list[Prefilled]]:
        """Run prompts in one pass, fill their `kv` and return the logits that follow each.

        Here and in `decode`, `kv` names the adapter.
        """

    def warm_up_decode(self, pages: Tensor, max_batch: int) -> None:
        """Make decode steps ready for up to `max_batch` rows of sequences with KV in `pages`."""

    def decode(
        self, token_ids: Sequence[int] | Tensor, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None
    ) -> Tensor:
        """One step of several sequences, with one or `num_rows` new rows of each; token ids may be on the device.

        Returns:
            float32 logits [R, vocab_size] of every row, which hold until the next step.
        """
