"""What is said of a value that pydantic refuses."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from trimserve.validation import complaint


def said(kind: Any, value: Any, **options: bool) -> str:
    """Of the first error."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    return complaint(caught.value.errors()[0], **options)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        ("many", "'many'"),
        ("m" * 81, f"'{'m' * 80}'..."),
        (float("nan"), "nan"),
        ([1, 2], "a list of 2"),
        ({"a": 1}, "an object of 1"),
    ],
)
def test_the_value_stands_behind_the_rule(value: object, shown: str) -> None:
    words = said(int, value)
    assert words.startswith("Input should be a")
    assert words.endswith(f", got {shown}")


def test_a_flag_is_written_as_in_json() -> None:
    assert said(str, True).endswith(", got true")


def test_a_secret_is_not_shown() -> None:
    assert "hunter2" not in said(int, "hunter2", is_secret=True)


def test_a_place_without_a_value_shows_none() -> None:
    assert said(dict[str, int], "x").endswith(", got 'x'")
    assert said(tuple[int, int], (1,)) == "Field required"
