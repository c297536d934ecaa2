"""Bounds of a request that do not depend on the model; `ModelInfo` has the others, and the protos state the same."""

import re
from dataclasses import dataclass

__all__ = [
    "BOUNDS",
    "MAX_LOGIT_BIASES",
    "MAX_MESSAGES",
    "MAX_PARTS",
    "MAX_REQUEST_ID_CHARS",
    "MAX_STOP_CHARS",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKENS",
    "REQUEST_ID",
    "Interval",
]

MAX_REQUEST_ID_CHARS = 128
MAX_MESSAGES = 4096
MAX_PARTS = 4096
"""Of all messages of a request together."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1024

REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")
"""A whole request id."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers between two ends; NaN is in none."""

    low: float
    high: float
    is_low_open: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = value > self.low if self.is_low_open else value >= self.low
        return is_above and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.is_low_open else '['}{self.low}, {self.high}]"


BOUNDS = {
    "num_choices": Interval(1, 16),
    "priority": Interval(-1000, 1000),
    "sampling.temperature": Interval(0, 100),
    "sampling.top_p": Interval(0, 1, is_low_open=True),
    "sampling.min_p": Interval(0, 1),
    "sampling.repetition_penalty": Interval(0.01, 100),
    "sampling.presence_penalty": Interval(-2, 2),
    "sampling.frequency_penalty": Interval(-2, 2),
    "sampling.logit_bias": Interval(-100, 100),
    "sampling.num_top_logprobs": Interval(0, 20),
    "trim.k_ratio": Interval(0, 1, is_low_open=True),
    "trim.max_kept_fraction": Interval(0, 1, is_low_open=True),
    "trim.merge_ratio": Interval(0, 1),
    "trim.budget.ratio": Interval(0, 1, is_low_open=True),
    "trim.budget.count": Interval(1, 2**32 - 1),
    "trim.budget.top_p": Interval(0, 1, is_low_open=True),
    "trim.look_again.side_ratio": Interval(0, 1, is_low_open=True),
}
"""By field path."""
