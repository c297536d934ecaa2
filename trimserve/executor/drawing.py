"""From logits to the tokens of a step: what constraints forbid, sampling, and which drafts are what is drawn.

A row behind drafts is drawn as if the drafts had been drawn before it, with the same seed and position, penalties and
constraint. A draft is accepted while it equals what is drawn in its place, so the tokens are those of a run without
drafts (ADR-0018). It knows no model and no pages.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from trimserve.errors import InvalidRequest, RequestFailed, TrimserveError
from trimserve.executor.guide import Guide, Guides
from trimserve.executor.plan import Drawn, Failed
from trimserve.executor.sampling import SampledToken, SamplingState, sample

__all__ = ["Answer", "draw", "take"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """By what the tokens of a sequence are drawn."""

    sequence: int
    request_id: str
    """For the log."""
    sampling: SamplingState
    """Has what was drawn."""
    guide: Guide | None
    """None without a constraint."""
    choice: int
    """See `Drawn.choice`."""
    wants_forced: bool
    """See `NewSequence.wants_forced`."""


def draw(
    logits: Tensor, answers: Sequence[Answer], guides: Guides, drafts: Sequence[Sequence[int]] | None = None
) -> list[Drawn | Failed]:
    """Draw the next tokens of each answer, and go on with its constraint.

    Args:
        logits: float32 [R, vocab_size], of each answer those behind its last token and then behind each of its drafts.
        answers: [B].
        guides: follows their constraints, and has looked ahead at the drafts.
        drafts: [B], of each answer; None for none.
    Returns:
        In the order of the answers: of each its tokens, one at least, or why it cannot go on.
    """
    own_drafts = drafts or [()] * len(answers)
    states = [state for each, own in zip(answers, own_drafts, strict=True) for state in _states(each, own, guides)]
    return take(sample(logits, states), answers, guides, own_drafts)


def take(
    sampled: Sequence[SampledToken | RequestFailed],
    answers: Sequence[Answer],
    guides: Guides,
    drafts: Sequence[Sequence[int]],
) -> list[Drawn | Failed]:
    """Go on with what was sampled; as `draw`, which samples it.

    Args:
        sampled: [R], of each answer that behind its last token and then behind each of its drafts.
        answers: [B].
        guides: follows their constraints.
        drafts: [B], of each answer.
    """
    outcomes = iter(sampled)
    results: list[Drawn | Failed] = []
    going_on: list[Guide] = []
    for answer, own in zip(answers, drafts, strict=True):
        drawn = [*_accepted(answer, own, [*islice(outcomes, 1 + len(own))], guides)]
        results += drawn
        last = drawn[-1]
        if answer.guide is not None and isinstance(last, Drawn) and not last.is_complete:
            going_on.append(answer.guide)
    guides.make_masks(going_on)
    return results


def _states(answer: Answer, drafts: Sequence[int], guides: Guides) -> Iterator[SamplingState]:
    num_generated = len(answer.sampling.generated_token_ids)
    for count in range(1 + len(drafts)):
        forbidden = None
        if answer.guide is not None:
            forbidden = guides.forbidden(answer.guide, num_generated + count, count)
        if count:
            yield answer.sampling.after(drafts[:count], forbidden)
        else:
            answer.sampling.forbidden = forbidden
            yield answer.sampling


def _accepted(
    answer: Answer, drafts: Sequence[int], outcomes: Sequence[SampledToken | RequestFailed], guides: Guides
) -> Iterator[Drawn | Failed]:
    """What was drawn, up to the first token that is not what its draft was."""
    guide = answer.guide
    # Behind a draft that the constraint does not allow, or that could not be followed, nothing is drawn.
    known = outcomes if guide is None or guide.failure is not None else outcomes[: len(guide.masks)]
    for row, (outcome, draft) in enumerate(zip(known, [*drafts[: len(known) - 1], None], strict=True)):
        error = outcome if isinstance(outcome, TrimserveError) else None if guide is None else guide.failure
        if error is not None:
            if not row:  # else the tokens before come first, and the next step meets the same
                yield _failed(answer, error)
            return
        assert isinstance(outcome, SampledToken)
        answer.sampling.generated_token_ids.append(outcome.token_id)
        is_complete = guide is not None and guides.take(guide, outcome.token_id)
        is_last = is_complete or outcome.token_id != draft
        forced: tuple[int, ...] = ()
        if guide is not None and answer.wants_forced and is_last and not is_complete:
            forced = guides.forced(guide)
        yield Drawn(answer.sequence, outcome.token_id, outcome.logprob, answer.choice, is_complete, forced)
        if is_last:
            return


def _failed(answer: Answer, error: TrimserveError) -> Failed:
    if isinstance(error, InvalidRequest):
        return Failed(answer.sequence, error.message, field=error.field)
    log.error("request failed", exc_info=error, extra={"request_id": answer.request_id})
    return Failed(answer.sequence, str(error))
