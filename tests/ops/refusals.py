"""Arguments that an op refuses, and the message that it gives."""

from collections.abc import Callable, Sequence

import pytest

__all__ = ["assert_refused"]


def assert_refused(op: Callable[..., object], arguments: Sequence[object], message: str) -> None:
    """The whole message is compared: the op's name, and what is wrong."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        op(*arguments)
    assert str(error.value) == f"{op.__name__}: {message}"
