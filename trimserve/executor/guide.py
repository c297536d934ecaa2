"""Which tokens a sequence's constraint allows next: made beside the step that computes the logits (ADR-0015).

One thread of its own compiles and makes masks; the thread that runs steps says which tokens were drawn, and waits for
masks only where it needs them. It knows no logits.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
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
_MOST_FORCED_BYTES: Final = 64
"""Of text that must come next: more than the drafts of a step write."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """What may be next at one place of an answer."""

    words: NDArray[np.int32]
    """A bit for each token."""
    may_end: bool
    """Whether the constraint is satisfied as it is."""


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
    masks: list[_Mask] = field(default_factory=list, repr=False)
    """What follows the last token, then what follows each draft, as far as the constraint allows the drafts."""
    work: "Future[None] | None" = field(default=None, repr=False)
    """What makes the masks."""

    def wait(self) -> None:
        """Wait for the masks."""
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

    def look_ahead(self, guide: Guide, drafts: Sequence[int]) -> None:
        """Begin with the masks that follow drafts, beside the step that computes their logits.

        Args:
            guide: of a sequence whose answer is not complete.
            drafts: tokens that may be next, in order.
        """
        guide.work = self._thread.submit(self._make_more_masks, guide, guide.work, tuple(drafts))

    def forbidden(self, guide: Guide, num_generated: int, num_drafts: int = 0) -> NDArray[np.bool_] | None:
        """Tokens that may not be next, bool [vocab_size].

        Args:
            guide: of a sequence whose answer is not complete.
            num_generated: tokens it has, drafts among them.
            num_drafts: that it has been given in `look_ahead`, if they are drawn.
        Returns:
            None where these drafts cannot be drawn, or could not be followed.
        """
        guide.wait()
        if guide.failure is not None:
            return np.zeros(self._num_tokens, np.bool_)
        if num_drafts >= len(guide.masks):
            return None
        mask = guide.masks[num_drafts]
        bits = np.unpackbits(mask.words.view(np.uint8), bitorder="little")[: self._num_tokens]
        allowed = np.zeros(self._num_tokens, np.bool_)  # the mask may be narrower than the logits
        allowed[: len(bits)] = bits
        own, models = self._known(guide.end_token_ids), self._known(self._model_ends)
        if mask.may_end:
            allowed[own + models] = True
        going_on = allowed.copy()
        if guide.params.ignore_eos:
            going_on[models] = False
        if num_generated < guide.params.min_new_tokens:
            going_on[own] = False
        # Where nothing else is possible it ends, whatever was asked.
        return ~(going_on if going_on.any() else allowed)

    def take(self, guide: Guide, token_id: int) -> bool:
        """Go on by a token that was drawn where `forbidden` allowed it; `make_masks` comes when there are no more.

        Returns:
            Whether the answer is complete with it.
        """
        matcher = guide.matcher
        assert matcher is not None, "a guide is waited for before a token is drawn"
        if token_id in guide.end_token_ids or token_id in self._model_ends:
            return True
        matcher.consume_token(token_id)
        is_stopped = matcher.is_stopped()  # complete, or in error, which may come of asking
        if matcher.is_error():
            guide.failure = refusal(guide.constraint, matcher.get_error())
        return is_stopped and guide.failure is None

    def forced(self, guide: Guide) -> tuple[int, ...]:
        """Tokens that write what must come next, of a guide whose masks are not made yet; see `Drawn.forced`."""
        if guide.failure is not None or guide.matcher is None:
            return ()
        text = guide.matcher.compute_ff_bytes()[:_MOST_FORCED_BYTES]
        return tuple(self._grammars.tokenizer.tokenize_bytes(text)) if text else ()

    def make_masks(self, guides: Sequence[Guide]) -> None:
        """Begin with the masks that follow what was taken."""
        if guides:
            work = self._thread.submit(self._make_masks, guides)
            for guide in guides:
                guide.work = work

    # ---- the thread ----

    def _begin(self, guide: Guide, generated_token_ids: Sequence[int]) -> None:
        guide.matcher = self._grammars.matcher(guide.constraint)
        if generated_token_ids:
            guide.matcher.consume_tokens([*generated_token_ids])
        self._make_masks([guide])

    def _make_masks(self, guides: Sequence[Guide]) -> None:
        matchers = [guide.matcher for guide in guides if guide.matcher is not None]
        for guide, matcher, mask in zip(guides, matchers, self._masks(matchers), strict=True):
            guide.masks = [mask]
            if matcher.is_error():
                guide.failure = refusal(guide.constraint, matcher.get_error())

    def _make_more_masks(self, guide: Guide, before: "Future[None] | None", drafts: Sequence[int]) -> None:
        if before is not None:
            before.result()  # it is done, on this thread
        assert guide.matcher is not None, "a guide begins with a matcher"
        matcher = guide.matcher.deep_copy()  # which may fail on drafts that are never drawn
        ends = guide.end_token_ids | self._model_ends
        text = [*takewhile(lambda token_id: token_id not in ends, drafts)]
        for token_id in text[: matcher.validate_tokens(text)]:
            matcher.consume_token(token_id)
            if matcher.is_stopped():  # complete, or in error
                return
            [mask] = self._masks([matcher])
            if matcher.is_error():
                return
            guide.masks.append(mask)

    def _masks(self, matchers: Sequence[LLMatcher]) -> list[_Mask]:
        num_words = -(-self._grammars.tokenizer.vocab_size // _WORD_BITS)
        words = np.empty((len(matchers), num_words), np.int32)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._llguidance.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.strides[0], len(rows))
        return [_Mask(own, matcher.is_accepting()) for matcher, own in zip(matchers, words, strict=True)]

    def _known(self, token_ids: frozenset[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id < self._num_tokens]
