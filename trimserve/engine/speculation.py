"""Which drafts a step checks: those that are expected to bring more tokens a second than their rows cost (ADR-0018).

Drafts take places of the batch that are free, so a full batch has none. How often they were right lately, and what
steps with so many rows took, says how many pay; where none does, it looks again after a while. It makes no drafts.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from trimserve.engine.sequence import Sequence
from trimserve.engine.step_costs import StepCosts
from trimserve.executor.drafter import Drafter, Text
from trimserve.executor.plan import Rows, StepResult

__all__ = ["MOST_DRAFTS", "Speculation", "most_rows"]

MOST_DRAFTS: Final = 8
"""Of one sequence in a step."""

_FIRST_RATE: Final = 0.6
_RATE_AFTER_REST: Final = 0.4
_LEAST_RATE: Final = 0.1
"""Drafts that are right less often are left out, however little their rows seem to cost."""
_WEIGHT: Final = 0.2
"""Of a draft that was just checked, among all before it."""
_REST: Final = 32
"""Tokens without drafts where they do not pay; twice as many each time that they then are wrong again."""


@dataclass(slots=True)
class _Trust:
    """How often drafts of one kind were right in a sequence."""

    rate: float = _FIRST_RATE
    """Expected share of drafts that are accepted, of those whose predecessors are."""
    resumes_at: int = 0
    """Tokens that the sequence has when drafts are tried again."""
    rest: int = _REST
    """Tokens without drafts that the next pause lasts."""
    was_checked: bool = False
    """Whether any draft was, since the last rest."""

    def saw(self, num_drafts: int, num_accepted: int) -> None:
        """Learn from drafts that a step has checked."""
        for _ in range(num_accepted):
            self.rate += _WEIGHT * (1 - self.rate)
        if num_accepted < num_drafts:
            self.rate -= _WEIGHT * self.rate
        if num_accepted:
            self.rest = _REST
        self.was_checked = True

    def pause(self, num_tokens: int) -> None:
        """Try no drafts for a while, from so many tokens of the sequence on."""
        self.resumes_at = num_tokens + self.rest
        if self.was_checked:  # else they were not wrong: others took the room, or steps were dear
            self.rest *= 2
        self.rate, self.was_checked = max(self.rate, _RATE_AFTER_REST), False


@dataclass(slots=True)
class _Followed:
    """What is known of a running sequence."""

    forced: tuple[int, ...] = ()
    """See `Drawn.forced`."""
    trust_forced: _Trust = field(default_factory=_Trust)
    trust_drafter: _Trust = field(default_factory=_Trust)
    checked: _Trust | None = None
    """Of the drafts that are being checked."""


@dataclass(frozen=True, slots=True)
class _Proposal:
    """Drafts of a sequence."""

    sequence: Sequence
    drafts: tuple[int, ...]
    trust: _Trust


def most_rows(max_batch: int, *, has_drafts: bool) -> int:
    """Rows of the largest step of a batch, and of its drafts if there are any."""
    return max(max_batch, 1 + MOST_DRAFTS) if has_drafts else max_batch


class Speculation:
    """Chooses drafts for each step, and learns from what became of them."""

    def __init__(self, drafter: Drafter | None, max_batch: int) -> None:
        """Know nothing yet.

        Args:
            drafter: guesses where no constraint forces anything; None for no drafts at all.
            max_batch: sequences that run together.
        """
        self.is_on = drafter is not None
        """Whether there are drafts."""
        self.most_rows = most_rows(max_batch, has_drafts=self.is_on)
        """Of a step."""
        self.num_proposed = 0
        """Drafts that were checked."""
        self.num_accepted = 0
        """Those that were what was drawn, and whose predecessors were."""
        self._drafter = drafter
        self._costs = StepCosts()
        self._followed: dict[int, _Followed] = {}

    def drafts(self, batch: Iterable[Sequence]) -> dict[int, tuple[int, ...]]:
        """Drafts for the next step of a batch, by the number of their sequence, where there are any."""
        running = [*batch]
        room = self.most_rows - len(running)
        if self._drafter is None or room <= 0:
            return {}
        proposals = self._proposals(self._drafter, running)
        counts = self._worth(proposals, len(running), room) if proposals else {}
        chosen = {}
        for each in proposals:
            number = each.sequence.number
            if count := counts.get(number, 0):
                chosen[number] = each.drafts[:count]
                self._followed[number].checked = each.trust
            else:
                each.trust.pause(each.sequence.num_generated_tokens)
        return chosen

    def saw(self, rows: Collection[Rows], result: StepResult) -> None:
        """Learn from a step.

        Args:
            rows: that were run.
            result: of the step; its sequences may have ended with it.
        """
        if not self.is_on:
            return
        num_rows = sum(1 + len(each.drafts) for each in rows)
        with_drafts = [each for each in rows if each.drafts]
        num_drawn = Counter(drawn.sequence for drawn in result.drawn) if with_drafts else {}
        for each in with_drafts:
            num_drafts, num_accepted = len(each.drafts), max(0, num_drawn.get(each.sequence, 0) - 1)
            self.num_proposed += num_drafts
            self.num_accepted += num_accepted
            followed = self._followed.get(each.sequence)
            if followed is not None and followed.checked is not None:
                followed.checked.saw(num_drafts, num_accepted)
        if result.rows_seconds:
            self._costs.saw(num_rows, result.rows_seconds)

    def expect(self, sequence: int, forced: tuple[int, ...]) -> None:
        """Take what a running sequence's constraint forces next; see `Drawn.forced`."""
        if self.is_on:
            self._known(sequence).forced = forced

    def forget(self, sequence: int) -> None:
        """Let go of what is known of a sequence, by its number."""
        if self._drafter is not None and self._followed.pop(sequence, None) is not None:
            self._drafter.forget(sequence)

    def _proposals(self, drafter: Drafter, batch: Iterable[Sequence]) -> list[_Proposal]:
        proposals, asked = [], []
        for sequence in batch:
            known, num_tokens = self._known(sequence.number), sequence.num_generated_tokens
            if known.forced and num_tokens >= known.trust_forced.resumes_at:
                proposals.append(_Proposal(sequence, known.forced, known.trust_forced))
            elif num_tokens >= known.trust_drafter.resumes_at:
                asked.append(sequence)
        texts = [Text(each.number, each.prompt_token_ids, each.generated_token_ids) for each in asked]
        for sequence, drafts in zip(asked, drafter.propose(texts, MOST_DRAFTS), strict=True):
            if drafts:
                trust = self._known(sequence.number).trust_drafter
                proposals.append(_Proposal(sequence, tuple(drafts), trust))
        # The last token that a sequence may draw has no drafts behind it.
        return [each for each in map(_cut, proposals) if each.drafts]

    def _known(self, sequence: int) -> _Followed:
        known = self._followed.get(sequence)
        if known is None:
            known = self._followed[sequence] = _Followed()
        return known

    def _worth(self, proposals: Iterable[_Proposal], batch_size: int, room: int) -> Counter[int]:
        """How many drafts of each proposal bring the most tokens a second together."""
        gains = [
            (each.trust.rate ** (place + 1), each.sequence.number)
            for each in proposals
            for place in range(len(each.drafts))
            if each.trust.rate ** (place + 1) >= _LEAST_RATE
        ]
        gains.sort(reverse=True)
        tokens, costs = float(batch_size), self._costs
        best, num_best = tokens / costs.seconds(batch_size), 0
        for count, (gain, _) in enumerate(gains[:room], start=1):
            tokens += gain
            if (rate := tokens / costs.seconds(batch_size + count)) > best:
                best, num_best = rate, count
        return Counter(number for _, number in gains[:num_best])


def _cut(proposal: _Proposal) -> _Proposal:
    sequence = proposal.sequence
    most = min(MOST_DRAFTS, sequence.max_new_tokens - sequence.num_generated_tokens - 1)
    return _Proposal(sequence, proposal.drafts[: max(0, most)], proposal.trust)
