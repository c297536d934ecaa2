"""Rows of the steps to come, and pages for them: nobody is preempted for what is only likely to be needed."""

from collections.abc import Collection, Iterable

from trimserve.engine.kv_pool import KVPool
from trimserve.engine.sequence import Sequence
from trimserve.executor.plan import Rows

__all__ = ["has_room", "rows_ahead", "with_room"]


def has_room(pool: KVPool, sequence: Sequence, num_positions: int, grown: set[Sequence]) -> bool:
    """Whether a running sequence has pages for so many positions; free ones are given to it.

    Args:
        pool: of the pages.
        sequence: that runs.
        num_positions: of its text.
        grown: takes the sequence if it was given pages.
    """
    pages = sequence.pages
    if 0 < pages.missing_pages(num_positions) <= pool.num_free_pages:
        pages.grow(num_positions)
        grown.add(sequence)
    return pages.num_positions >= num_positions


def with_room(pool: KVPool, sequence: Sequence, drafts: tuple[int, ...], grown: set[Sequence]) -> tuple[int, ...]:
    """The drafts that there are pages for; what is rejected is written over. Otherwise as `has_room`."""
    if has_room(pool, sequence, sequence.num_tokens + len(drafts), grown):
        return drafts
    return drafts[: sequence.pages.num_positions - sequence.num_tokens]


def rows_ahead(
    pool: KVPool, batch: Iterable[Sequence], drawing: Collection[Sequence], grown: set[Sequence]
) -> tuple[Rows, ...]:
    """Rows of the step after the next one.

    Args:
        pool: of the pages.
        batch: all that run.
        drawing: those among them that draw a token in the next step.
        grown: as in `has_room`.
    Returns:
        Of all that certainly want one more token, unless they end; none if there are too few free pages for all.
    """
    rows = []
    for sequence in batch:
        is_drawing = sequence in drawing
        if sequence.num_generated_tokens + is_drawing >= sequence.max_new_tokens:
            continue
        if not has_room(pool, sequence, sequence.num_tokens + is_drawing, grown):
            return ()
        rows.append(Rows(sequence.number, sequence.num_positions + is_drawing))
    return tuple(rows)
