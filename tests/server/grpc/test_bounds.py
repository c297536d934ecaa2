"""Numbers of a request are taken exactly when they are within the bounds that the protos tell."""

from math import inf, nextafter

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.conftest import Field
from tests.server.fakes import chat_request, converted
from trimserve.api.bounds import (
    BOUNDS,
    MAX_LOGIT_BIASES,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from trimserve.errors import InvalidRequest

SPELLED = {"sampling.logit_bias", "trim.budget.count"}
"""Bounds that the protos tell in another way."""

SAID = {
    **{path: f"Range: {interval}." for path, interval in BOUNDS.items() if path not in SPELLED},
    "trim.budget.count": "Range: [1, 2^32 - 1].",
    "request_id": f"Range: at most {MAX_REQUEST_ID_CHARS} of ",
    "sampling.logit_bias": f"Range: at most {MAX_LOGIT_BIASES} ids, each in [0, vocab_size), each bias in "
    f"{BOUNDS['sampling.logit_bias']}.",
    "sampling.stop_strings": f"Range: at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters.",
    "sampling.stop_token_ids": f"Range: at most {MAX_STOP_TOKENS} ids in [0, vocab_size).",
}
"""How the protos must tell the bounds of this code."""


def test_the_protos_tell_the_same_bounds(said: dict[str, Field]) -> None:
    for path, wanted in SAID.items():
        assert wanted in said[path][1], path


def test_every_value_of_a_request_tells_its_range(said: dict[str, Field]) -> None:
    free = {FieldDescriptorProto.TYPE_BOOL, FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.TYPE_MESSAGE}
    numbers = {path: comment for path, (field, comment) in said.items() if field.type not in free}
    assert {"sampling.seed", "sampling.top_k", "trim.mode", "Image.data", "Message.role"} <= numbers.keys()
    for path, comment in numbers.items():
        assert "Range: " in comment, path


NUMBERS = [path for path in BOUNDS if path.count(".") == 1 and path != "sampling.logit_bias"]


def assert_taken_when_within(path: str, value: float) -> None:
    """Ask with a value of a field, where its type can hold it."""
    section, _, field = path.partition(".")
    request = chat_request()
    if field == "num_top_logprobs":
        if not (value.is_integer() and 0 <= value < 2**32):
            return
        value = int(value)
    setattr(getattr(request, section), field, value)
    interval = BOUNDS[path]
    is_within = interval.low <= value <= interval.high and not (interval.is_low_open and value == interval.low)
    if is_within:
        assert getattr(getattr(converted(request), section), field) == value
    else:
        with pytest.raises(InvalidRequest, match=f"^{path}: must be in"):
            converted(request)


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_is_taken_exactly_when_it_is_within_its_bounds(path: str) -> None:
    for bound in map(float, (BOUNDS[path].low, BOUNDS[path].high)):
        for value in (bound, nextafter(bound, -inf), nextafter(bound, inf), bound - 1, bound + 1):
            assert_taken_when_within(path, value)


@settings(max_examples=300)
@given(path=st.sampled_from(NUMBERS), value=st.floats() | st.integers(0, 30).map(float))
def test_any_number_is_taken_or_refused_by_its_bounds(path: str, value: float) -> None:
    assert_taken_when_within(path, value)
