"""From tokens to text, one token at a time: whole code points only, and nothing of a stop string.

What comes out, concatenated, is the decoding of all tokens at once, cut before the stop string that ended it.
Special tokens give no text. It knows nothing about why generation ends otherwise.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["Detokenizer"]


class Detokenizer:
    """Incremental detokenisation of one request.

    The stop string that is complete first wins, the longest of those that are complete at the same character.
    So it depends on the text alone, not on what would have followed, nor on where tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """Start with no text.

        Args:
            tokenizer: of the model.
            stop_strings: none empty.
        """
        self.matched_stop: str | None = None
        """The stop string that was found; no text comes out any more."""
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_decoded = 0  # characters that the stream has given
        self._held = ""  # given, but possibly the beginning of a stop string

    def add(self, token_id: int, *, watch: bool = True) -> str:
        """Take the next token.

        Args:
            token_id: of the model.
            watch: look for stop strings; a stop string must lie wholly in text that came while watching.
        Returns:
            Text that is now certain, possibly empty.
        """
        self._token_ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_decoded += len(text)
        return self._scan(text) if watch else text

    def finish(self, *, watch: bool = True) -> str:
        """The rest of the text after the last token: what was held back, an incomplete code point as U+FFFD.

        Args:
            watch: as in `add`.
        """
        # The stream withholds U+FFFD at the end, which may yet become a character; the full decoding decides.
        rest = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)[self._num_decoded :]
        self._num_decoded += len(rest)
        text = self._scan(rest) if watch else rest
        held, self._held = self._held, ""
        return text + held

    def _scan(self, text: str) -> str:
        if not self._stop_strings:
            return text
        if self.matched_stop is not None:
            return ""
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if matches:
            end, start = min(matches)
            self.matched_stop, self._held = text[start:end], ""
            return text[:start]
        certain = len(text) - self._num_undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def _num_undecided(self, text: str) -> int:
        """Characters at the end of `text` that a stop string could begin with."""
        longest = min(len(text), max(map(len, self._stop_strings), default=0))
        for count in range(longest, 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop_strings):
                return count
        return 0
