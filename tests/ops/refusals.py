"""Arguments that an op refuses, and the message that it gives."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

__all__ = ["assert_refused", "refusing"]


def assert_refused(op: Callable[..., object], arguments: Sequence[object], message: str) -> None:
    """The whole message is compared: the op's name, and what is wrong."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        op(*arguments)
    assert str(error.value) == f"{op.__name__}: {message}"


def refusing(
    op: Callable[..., object], refusals: Iterable[tuple[Sequence[Any], str]], where: str = "host"
) -> Callable[..., None]:
    """A test that `op` refuses arguments with a message, for each of some pairs.

    Args:
        op: of `trimserve.ops`.
        refusals: arguments and messages.
        where: fixture that says where: `host`, or `checked_values` if values are looked at.
    """

    @pytest.mark.usefixtures(where)
    @pytest.mark.parametrize(("arguments", "message"), refusals)
    def test(arguments: Sequence[Any], message: str) -> None:
        assert_refused(op, arguments, message)

    refuses: Callable[..., None] = test
    return refuses
