"""A request as every transport hands it to the engine."""

from dataclasses import dataclass

from trimserve.api.constraint import Constraint
from trimserve.api.prompt import Prompt
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest

__all__ = ["GenerationRequest"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request, validated except for what needs the tokenizer or the images' pixels."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    trim: TrimRequest
    num_choices: int = 1
    """Answers to the prompt, each drawn with a seed of its own (`SamplingParams.of_choice`)."""
    priority: int = 0
    """Higher goes first; equal priorities are served in order of arrival."""
    adapter: str | None = None
    """Name of the adapter that answers; None is the base model."""
    constraint: Constraint | None = None
    """What form the answer must have; None for any."""
