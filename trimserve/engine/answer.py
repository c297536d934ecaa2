"""One answer as it grows: its tokens, its text, and why it ended. It knows no pages and no other answer."""

import time

from tokenizers import Tokenizer

from trimserve.api.chunks import FinishReason
from trimserve.api.info import ModelInfo
from trimserve.api.sampling import SamplingParams
from trimserve.engine.detokenizer import Detokenizer
from trimserve.engine.limits import most_new_tokens
from trimserve.executor.plan import Drawn

__all__ = ["Answer"]


class Answer:
    """What was drawn until now, and when it is enough."""

    def __init__(
        self, params: SamplingParams, end_token_ids: frozenset[int], max_new_tokens: int, tokenizer: Tokenizer
    ) -> None:
        """Begin with no token; `to` counts the bounds.

        Args:
            params: how its tokens are drawn.
            end_token_ids: any of them ends it.
            max_new_tokens: at which it ends otherwise.
            tokenizer: of the model.
        """
        self.params = params
        """How its tokens are drawn."""
        self.end_token_ids = end_token_ids
        """The checkpoint's and the request's; any of them ends it."""
        self.max_new_tokens = max_new_tokens
        """At which it ends otherwise."""
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
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.stop_strings)

    @classmethod
    def to(cls, params: SamplingParams, num_prompt_tokens: int, info: ModelInfo, tokenizer: Tokenizer) -> "Answer":
        """The answer to a prompt, with no token yet.

        Args:
            params: how its tokens are drawn.
            num_prompt_tokens: of the prompt.
            info: of the model.
            tokenizer: of the model.
        Raises:
            InvalidRequest: see `most_new_tokens`.
        """
        ends = () if params.ignore_eos else info.generation_defaults.eos_token_ids
        most = most_new_tokens(params, num_prompt_tokens, info)
        return cls(params, frozenset((*ends, *params.stop_token_ids)), most, tokenizer)

    def of_choice(self, choice: int) -> "Answer":
        """Another answer to the same prompt, with no token yet."""
        return Answer(self.params.of_choice(choice), self.end_token_ids, self.max_new_tokens, self._tokenizer)

    def append(self, drawn: Drawn) -> str:
        """Take the next token; sets `finish_reason` when it is the last.

        Returns:
            Text that is now certain. The text of an end or stop token is not part of the answer.
        """
        token_id, began_at = drawn.token_id, time.monotonic()
        if not self.token_ids:
            self.first_token_at = began_at
        self.token_ids.append(token_id)
        is_end = token_id in self.end_token_ids
        is_last = is_end or drawn.is_complete or len(self.token_ids) >= self.max_new_tokens
        watch = len(self.token_ids) >= self.params.min_new_tokens
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
