"""From tokens to text, one token at a time: whole code points only, and nothing of a stop string.

What comes out, concatenated, is the decoding of all tokens at once, cut before the stop string that ended it.
Special tokens give no text. It knows nothing about why generation ends otherwise.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

__all__ = ["Detokenizer", "token_bytes"]

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
"""Bytes by the characters that stand for them in the vocabulary of a byte-level tokenizer, as GPT-2 chose them."""


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


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text, in UTF-8; nothing if the tokenizer does not know it.

    Args:
        tokenizer: of the model; one that is not byte-level decodes each token alone.
        token_id: special ones are their own names.
    Returns:
        A part of a code point where the token is no more.
    """
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    if not isinstance(tokenizer.decoder, ByteLevel):
        return tokenizer.decode([token_id], skip_special_tokens=False).encode()
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()  # added to the vocabulary as it is
