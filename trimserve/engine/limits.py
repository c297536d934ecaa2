"""What a request may not ask for: more than the context or the page pool can hold."""

from trimserve.api.info import ModelInfo
from trimserve.api.sampling import SamplingParams
from trimserve.engine.kv_pool import KVPool
from trimserve.errors import InvalidRequest

__all__ = ["check_that_it_fits", "most_new_tokens"]


def most_new_tokens(params: SamplingParams, num_prompt_tokens: int, info: ModelInfo) -> int:
    """Tokens that may come after a prompt.

    Raises:
        InvalidRequest: the context has no room for one, for `max_new_tokens`, or for `min_new_tokens`.
    """
    wanted = params.max_new_tokens
    room = info.max_model_len - num_prompt_tokens
    context = f"a prompt of {num_prompt_tokens} tokens in a context of {info.max_model_len}"
    if room < 1:
        raise InvalidRequest("prompt", f"{context} leaves no room for an answer")
    if wanted is not None and wanted > room:
        raise InvalidRequest("sampling.max_new_tokens", f"{context} leaves room for {room}, got {wanted}")
    most = min(info.generation_defaults.max_new_tokens, room) if wanted is None else wanted
    if params.min_new_tokens > most:
        bound = f"must be at most {most}, the tokens that may come after {context}"
        raise InvalidRequest("sampling.min_new_tokens", f"{bound}, got {params.min_new_tokens}")
    return most


def check_that_it_fits(pool: KVPool, max_positions: int, max_cross_rows: int) -> None:
    """Refuse what even an empty pool cannot hold.

    Args:
        pool: knows its size.
        max_positions: of prompt and answer.
        max_cross_rows: of visual features.
    Raises:
        InvalidRequest: naming the bytes, and what would make it fit.
    """
    of_images = pool.cross_bytes(max_cross_rows)
    needed = pool.self_bytes(max_positions) + of_images
    if needed <= pool.capacity_bytes:
        return
    has_larger_images = of_images > needed - of_images
    advice = "a smaller trim.max_kept_fraction" if has_larger_images else "a smaller sampling.max_new_tokens"
    raise InvalidRequest(
        "trim.max_kept_fraction" if has_larger_images else "sampling.max_new_tokens",
        f"the request needs up to {needed} bytes of KV, {of_images} of them for its images, and the server has "
        f"{pool.capacity_bytes}; {advice}, or a larger kv_cache_bytes of the server, would make it fit",
    )
