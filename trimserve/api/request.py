"""One request, as every transport hands it to the engine."""

from dataclasses import dataclass

from trimserve.api.prompt import Prompt
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest

__all__ = ["GenerationRequest"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, validated as far as that is possible without the tokenizer and the images' pixels."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    trim: TrimRequest
    priority: int = 0
    """Larger is served earlier; first come first served among equals."""
