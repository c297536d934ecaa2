"""What the engine needs of a drafter: the seam between what a text may go on with and checking it (ADR-0018)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Drafter", "Text"]


class Text(NamedTuple):
    """Tokens of a running sequence."""

    sequence: int
    """Its number."""
    prompt_token_ids: Sequence[int]
    """The image tokens among them."""
    generated_token_ids: Sequence[int]
    """At least one. Those of a sequence only grow."""


class Drafter(Protocol):
    """Guesses how texts go on, on the engine's thread: by looking up, or by a smaller model with the same tokens."""

    def propose(self, texts: Sequence[Text], most: int) -> Sequence[Sequence[int]]:
        """Guess the next tokens of each text, up to `most`; no tokens where nothing is likely."""

    def forget(self, sequence: int) -> None:
        """Let go of what is kept of a sequence, if anything; its number may come no more."""
