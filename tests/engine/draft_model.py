"""A drafter that is a causal language model of transformers: what Llama-3.2-1B would be to a model of 11B."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from trimserve.executor.drafter import Text

__all__ = ["DraftModel"]


class DraftModel:
    """Drafts the likeliest tokens of a model that has the same tokens; it sees no images, and keeps nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Of a model that takes token ids."""
        self._model = model

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        return [self._next([*text.prompt_token_ids, *text.generated_token_ids], most) for text in texts]

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""

    @torch.inference_mode()
    def _next(self, token_ids: list[int], most: int) -> list[int]:
        for _ in range(most):
            logits = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
            token_ids = [*token_ids, int(logits[0, -1].argmax())]
        return token_ids[-most:]
