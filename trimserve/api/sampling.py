"""How the tokens of an answer are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; every default of the checkpoint is already filled in."""

    max_new_tokens: int | None = None
    """None: `GenerationDefaults.max_new_tokens` or the room left in the context, whichever is smaller."""
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
    """Unsigned 64 bits; the server draws one when the client sent none."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_top_logprobs: int | None = None
    """None: no logprobs at all; 0: of the drawn token only."""
