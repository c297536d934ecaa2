"""Drafts by looking up: a text goes on as it went on where it had the same last tokens before."""

from collections.abc import Sequence
from typing import Final

from trimserve.executor.drafter import Text

__all__ = ["Repeats"]

_ALIKE: Final = 3
"""Tokens in a row that must be the same."""


class Repeats:
    """Looks up the last place where a text, its prompt too, had its present last tokens; see `Drafter`."""

    def __init__(self) -> None:
        """Know no text."""
        self._texts: dict[int, _Text] = {}

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        """See `Drafter.propose`."""
        return [self._known(text).next_tokens(most) for text in texts]

    def forget(self, sequence: int) -> None:
        """See `Drafter.forget`."""
        self._texts.pop(sequence, None)

    def _known(self, text: Text) -> "_Text":
        known = self._texts.setdefault(text.sequence, _Text())
        if not known.token_ids:
            known.add(text.prompt_token_ids)
        known.add(text.generated_token_ids[len(known.token_ids) - len(text.prompt_token_ids) :])
        return known


class _Text:
    """A text with an index of what followed which tokens."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """Place of the token that followed these last."""

    def add(self, token_ids: Sequence[int]) -> None:
        """Go on with tokens, and remember what each of them followed."""
        known = self.token_ids
        for token_id in token_ids:
            if len(known) >= _ALIKE:
                self._followers[tuple(known[-_ALIKE:])] = len(known)
            known.append(token_id)

    def next_tokens(self, most: int) -> list[int]:
        """What followed the last tokens when they came before, up to `most`; none if they did not."""
        known = self.token_ids
        place = self._followers.get(tuple(known[-_ALIKE:]))
        if place is None:
            return []
        # What would follow the end has been copied itself by then: a text that repeats itself goes on doing so.
        return [known[place + count % (len(known) - place)] for count in range(most)]
