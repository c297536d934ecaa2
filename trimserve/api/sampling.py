"""Sampling parameters of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the checkpoint's defaults are already filled in."""

    max_new_tokens: int | None = None
    """None means the smaller of `GenerationDefaults.max_new_tokens` and the room left in the context."""
    min_new_tokens: int = 0
    """End tokens and stop strings have no effect before this many tokens."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """0 is greedy: the largest logit, ties to the lower id."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens."""
    presence_penalty: float = 0.0
    """Over generated tokens."""
    frequency_penalty: float = 0.0
    """Over generated tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Unsigned 64 bits; drawn by the server if the client sent none."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_top_logprobs: int | None = None
    """None for no logprobs, 0 for the drawn token's only."""

    def of_choice(self, choice: int) -> "SamplingParams":
        """Of one of several answers: the seed is this one's plus `choice`, modulo 2^64.

        Args:
            choice: counted from 0; that is `self`.
        """
        return replace(self, seed=(self.seed + choice) % 2**64) if choice else self
