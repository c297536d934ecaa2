"""Which tokens a sequence's constraint allows next: made beside the step that computes the logits (ADR-0015).

One thread of its own compiles and makes masks; the thread that runs steps says which tokens were drawn, and waits for
masks only where it needs them. It knows no logits.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from trimserve.api.constraint import Constraint
from trimserve.api.info import ModelInfo
from trimserve.api.sampling import SamplingParams
from trimserve.errors import RequestFailed, TrimserveError
from trimserve.executor.grammar import Grammars, refusal

__all__ = ["Guide", "Guides"]

_WORD_BITS: Final = 32


@dataclass(slots=True)
class Guide:
    """Where one sequence is in its constraint."""

    constraint: Constraint
    params: SamplingParams
    end_token_ids: frozenset[int]
    """Of the sequence."""
    failure: TrimserveError | None = None
    """Why the constraint cannot be followed any further; `forbidden` forbids nothing then."""
    matcher: LLMatcher | None = None
    """None until the first mask is made."""
    words: NDArray[np.int32] | None = None
    """A bit for each token that may be next."""
    may_end: bool = False
    """Whether the constraint is satisfied as it is."""
    work: "Future[None] | None" = field(default=None, repr=False)
    """What makes the mask that follows the last token."""

    def wait(self) -> None:
        """Wait for the mask that follows the last token."""
        if self.work is not None:
            work, self.work = self.work, None
            try:
                work.result()
            except TrimserveError as error:
                self.failure = error
            except Exception as error:  # noqa: BLE001  # logged with the request that fails
                self.failure = RequestFailed("following the constraint failed")
                self.failure.__cause__ = error


class Guides:
    """Follows the constraints of all sequences of an executor."""

    def __init__(self, grammars: Grammars, info: ModelInfo) -> None:
        """Follow none yet.

        Args:
            grammars: compiles.
            info: of the model.
        """
        self._grammars = grammars
        self._num_tokens = info.vocab_size
        self._model_ends = frozenset(info.generation_defaults.eos_token_ids)
        self._thread = ThreadPoolExecutor(1, "trimserve-grammar")
        self._llguidance = LLExecutor(max(1, (os.cpu_count() or 1) // 4))

    def begin(
        self,
        constraint: Constraint,
        params: SamplingParams,
        end_token_ids: frozenset[int],
        generated_token_ids: Sequence[int],
    ) -> Guide:
        """Follow a sequence, from the beginning or from where it was when it was dropped.

        Args:
            constraint: of its answer.
            params: `min_new_tokens` and `ignore_eos` bound where it may end.
            end_token_ids: that end it.
            generated_token_ids: drawn before it was dropped.
        """
        guide = Guide(constraint, params, end_token_ids)
        guide.work = self._thread.submit(self._begin, guide, tuple(generated_token_ids))
        return guide

    def forbidden(self, guide: Guide, num_generated: int) -> NDArray[np.bool_]:
        """Tokens that may not be next, bool [vocab_size].

        Args:
            guide: of a sequence whose answer is not complete.
            num_generated: tokens it has.
        """
        guide.wait()
        if guide.failure is not None or guide.words is None:
            return np.zeros(self._num_tokens, np.bool_)
        bits = np.unpackbits(guide.words.view(np.uint8), bitorder="little")[: self._num_tokens]
        allowed = np.zeros(self._num_tokens, np.bool_)  # the mask may be narrower than the logits
        allowed[: len(bits)] = bits
        own, models = self._known(guide.end_token_ids), self._known(self._model_ends)
        if guide.may_end:
            allowed[own + models] = True
        going_on = allowed.copy()
        if guide.params.ignore_eos:
            going_on[models] = False
        if num_generated < guide.params.min_new_tokens:
            going_on[own] = False
        # Where nothing else is possible it ends, whatever was asked.
        return ~(going_on if going_on.any() else allowed)

    def take(self, drawn: Sequence[tuple[Guide, int]]) -> list[bool]:
        """Go on by a token each, and begin with the masks that follow.

        Args:
            drawn: guides, and what was drawn where `forbidden` allowed it.
        Returns:
            Of each whether its answer is complete with this token.
        """
        complete = [guide.failure is not None or self._consume(guide, token_id) for guide, token_id in drawn]
        going_on = [guide for (guide, _), is_complete in zip(drawn, complete, strict=True) if not is_complete]
        if going_on:
            work = self._thread.submit(self._make_masks, going_on)
            for guide in going_on:
                guide.work = work
        return complete

    def _consume(self, guide: Guide, token_id: int) -> bool:
        matcher = guide.matcher
        assert matcher is not None, "a guide is waited for before a token is drawn"
        if token_id in guide.end_token_ids or token_id in self._model_ends:
            return True
        matcher.consume_token(token_id)
        if matcher.is_error():
            guide.failure = refusal(guide.constraint, matcher.get_error())
        return matcher.is_stopped()

    # ---- the thread ----

    def _begin(self, guide: Guide, generated_token_ids: Sequence[int]) -> None:
        guide.matcher = self._grammars.matcher(guide.constraint)
        if generated_token_ids:
            guide.matcher.consume_tokens([*generated_token_ids])
        self._make_masks([guide])

    def _make_masks(self, guides: Sequence[Guide]) -> None:
        matchers = [guide.matcher for guide in guides if guide.matcher is not None]
        num_words = -(-self._grammars.tokenizer.vocab_size // _WORD_BITS)
        words = np.empty((len(guides), num_words), np.int32)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._llguidance.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.strides[0], len(rows))
        for guide, matcher, own in zip(guides, matchers, words, strict=True):
            guide.words = own
            guide.may_end = matcher.is_accepting()
            if matcher.is_error():
                guide.failure = refusal(guide.constraint, matcher.get_error())

    def _known(self, token_ids: frozenset[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id < self._num_tokens]
