"""Whether a sequence that waits may begin now: in time for its deadline, and in one pass with others (ADR-0021)."""

from collections.abc import Collection
from typing import Final

from trimserve.api.info import ModelInfo
from trimserve.engine.pace import Pace
from trimserve.engine.sequence import Sequence
from trimserve.errors import DeadlinePassed
from trimserve.model.pieces import PIECE_ROWS

__all__ = ["lateness", "may_share_pass"]

_MOST_TOKENS: Final = PIECE_ROWS
"""Of prompts that share a pass: a layer of them takes no longer than a piece of a long prompt's, so that streams stall
no longer."""


def lateness(sequence: Sequence, pace: Pace, now: float) -> DeadlinePassed | None:
    """Why there is no point in beginning: the deadline comes before the fastest possible end.

    Args:
        sequence: that would join.
        pace: what was fastest.
        now: `time.monotonic()`.
    """
    if sequence.deadline is None or sequence.has_started:  # a stream that has begun goes on
        return None
    left = sequence.deadline - now
    least = pace.least_seconds(sequence.num_prompt_rows, sequence.least_new_tokens)
    if least <= left:
        return None
    return DeadlinePassed(f"the deadline cannot be met: {left:.3f} s are left and {least:.3f} s are needed at least")


def may_share_pass(sequences: Collection[Sequence], info: ModelInfo) -> bool:
    """Whether the prompts of sequences that join may be read in one pass over the layers (ADR-0021).

    Args:
        sequences: at least one; alone it may be anything.
        info: of the model: together they have no more visual features than the scratch of a prefill is made for.
    """
    if len(sequences) == 1:
        return True
    num_tokens = sum(each.num_prompt_tokens for each in sequences)
    num_features = sum(each.num_features for each in sequences)
    return (
        not any(each.has_started for each in sequences)  # who reads an answer again is no small prompt
        and num_tokens <= _MOST_TOKENS
        and num_features <= info.max_images * info.max_tiles * info.features_per_tile
    )
