"""A first request of our own, so that no client pays for what is made ready on first use."""

import time

from trimserve.api.chunks import GenerationChunk
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.engine.engine import Engine
from trimserve.errors import CheckpointError, InvalidRequest, TrimserveError

__all__ = ["warm_up"]

_ONE_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


def warm_up(engine: Engine) -> None:
    """Answer a request with an image; then let the engine take its memory.

    Args:
        engine: nothing else has used it.
    Raises:
        CheckpointError: `ModelInfo.max_model_len` is too small for any request with an image, or the page pool.
        TrimserveError: what the request failed with.
    """
    chunks: list[GenerationChunk | TrimserveError] = []
    try:
        sequence = engine.prepare(_request(engine.info), chunks.append, time.monotonic())
    except InvalidRequest as error:  # nobody sent it: what does not fit is the pool
        raise CheckpointError(f"kv_cache_bytes: must hold an image of a tile and an answer: {error.message}") from error
    engine.add(sequence)
    while engine.has_work:
        engine.step()
    if isinstance(chunks[-1], TrimserveError):
        raise chunks[-1]
    engine.resize_after_warm_up()


def _request(info: ModelInfo) -> GenerationRequest:
    room = info.max_model_len - 1
    if room < 1:
        raise CheckpointError(f"max_model_len must be at least 2, an image and an answer, got {info.max_model_len}")
    return GenerationRequest(
        request_id="warm-up",
        prompt=TokenPrompt((info.image_token_id,), (ImageFile(_ONE_PIXEL_PNG),)),
        sampling=SamplingParams(max_new_tokens=min(2, room), ignore_eos=True),
        trim=TrimRequest(k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio),
    )
