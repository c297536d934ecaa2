"""One answer as it grows: its tokens, its text, and why it ended. It knows no pages and no other answer."""

import time

from tokenizers import Tokenizer

from trimserve.api.chunks import FinishReason
from trimserve.api.sampling import SamplingParams
from trimserve.engine.detokenizer import Detokenizer
from trimserve.executor.plan import Drawn

__all__ = ["Answer"]


class Answer:
    """What was drawn until now."""

    def __init__(
        self, params: SamplingParams, end_token_ids: frozenset[int], max_new_tokens: int, tokenizer: Tokenizer
    ) -> None:
        """Begin with no token.

        Args:
            params: how its tokens are drawn.
            end_token_ids: the checkpoint's and the request's; any of them ends it.
            max_new_tokens: at which it ends otherwise.
            tokenizer: of the model.
        """
        self.token_ids: list[int] = []
        """Tokens drawn until now; only grows."""
        self.finish_reason: FinishReason | None = None
        """None while more tokens are wanted."""
        self.matched_stop: str | int | None = None
        """The stop string or the token that ended it."""
        self.first_token_at = 0.0
        """`time.monotonic()`; 0 before the first token."""
        self.detokenize_seconds = 0.0
        """Spent on its text."""
        self._params = params
        self._end_token_ids = end_token_ids
        self._max_new_tokens = max_new_tokens
        self._detokenizer = Detokenizer(tokenizer, params.stop_strings)

    def append(self, drawn: Drawn) -> str:
        """Take the next token; sets `finish_reason` when it is the last.

        Returns:
            Text that is now certain. The text of an end or stop token is not part of the answer.
        """
        token_id, began_at = drawn.token_id, time.monotonic()
        if not self.token_ids:
            self.first_token_at = began_at
        self.token_ids.append(token_id)
        is_end = token_id in self._end_token_ids
        is_last = is_end or drawn.is_complete or len(self.token_ids) >= self._max_new_tokens
        watch = len(self.token_ids) >= self._params.min_new_tokens
        text = "" if is_end else self._detokenizer.add(token_id, watch=watch)
        if is_last:
            text += self._detokenizer.finish(watch=watch)
        self.detokenize_seconds += time.monotonic() - began_at
        found = self._detokenizer.matched_stop
        if is_end or found is not None:
            self.finish_reason = FinishReason.STOP
            self.matched_stop = token_id if found is None else found
        elif drawn.is_complete:
            self.finish_reason = FinishReason.STOP
        elif is_last:
            self.finish_reason = FinishReason.LENGTH
        return text
