"""Drafts by looking up."""

import pytest

from trimserve.engine.repeats import Repeats
from trimserve.executor.drafter import Text


@pytest.mark.parametrize(
    ("prompt", "generated", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3], [4, 5, 6, 1]),
        ([9, 1, 2, 3, 4], [1, 2, 3], [4, 1, 2, 3]),  # what follows was copied itself
        ([1, 2, 3, 4, 1, 2, 3, 5], [0, 1, 2, 3], [5, 0, 1, 2]),  # the last place counts
        ([7, 7, 7], [7], [7, 7, 7, 7]),
        ([1, 2, 3, 4], [9, 2, 3], []),  # two tokens alike are too few
        ([1], [2], []),
    ],
)
def test_a_text_goes_on_as_after_the_same_three_tokens(
    prompt: list[int], generated: list[int], drafts: list[int]
) -> None:
    assert Repeats().propose([Text(0, prompt, generated)], most=4) == [drafts]


def test_a_text_that_has_grown_is_looked_up_with_what_it_has_grown_by() -> None:
    repeats = Repeats()
    assert repeats.propose([Text(5, [1, 2, 3], [4])], most=3) == [[]]
    assert repeats.propose([Text(5, [1, 2, 3], [4, 8, 1, 2, 3])], most=3) == [[4, 8, 1]]


def test_a_number_that_was_forgotten_is_another_text() -> None:
    repeats = Repeats()
    repeats.propose([Text(5, [1, 2, 3, 4], [1])], most=3)
    repeats.forget(5)
    assert repeats.propose([Text(5, [8], [1, 2, 3])], most=3) == [[]]
