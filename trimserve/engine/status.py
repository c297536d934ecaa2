"""What an engine and its requests come to at one moment, for whoever watches them."""

from collections.abc import Collection

from trimserve.api.status import EngineStatus
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.engine.memory import memory_by_kind
from trimserve.engine.sequence import SequenceState
from trimserve.engine.stream import Stream

__all__ = ["engine_status"]


def engine_status(
    engine: Engine | None,
    streams: Collection[Stream],
    config: EngineConfig,
    adapter_bytes: int,
    *,
    is_ready: bool,
    is_alive: bool,
    uptime_seconds: float,
) -> EngineStatus:
    """Put a status together.

    Args:
        engine: None while its model is loaded.
        streams: all that are open.
        config: limits of the engine.
        adapter_bytes: of all adapters.
        is_ready: whether requests are accepted.
        is_alive: whether the engine has not died.
        uptime_seconds: since it became ready.
    """
    states = [stream.state for stream in streams]
    running = [stream.sequence for stream in streams if stream.state is SequenceState.RUNNING]
    pool = None if engine is None else engine.pool  # once: the engine's thread may make another
    images = None if engine is None else engine.image_cache
    return EngineStatus(
        is_ready=is_ready,
        is_alive=is_alive,
        num_running=len(running),
        num_waiting=states.count(SequenceState.WAITING),
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        kv_capacity_bytes=pool.capacity_bytes if pool else 0,
        self_kv_bytes=pool.used_self_bytes if pool else 0,
        cross_kv_bytes=pool.used_cross_bytes if pool else 0,
        cross_kv_untrimmed_bytes=sum(sequence.cross_kv.untrimmed for sequence in running if sequence),
        num_preemptions=0 if engine is None else engine.num_preemptions,
        num_recomputed_tokens=0 if engine is None else engine.num_recomputed_tokens,
        num_prefill_passes=0 if engine is None else engine.num_prefill_passes,
        num_proposed_tokens=0 if engine is None else engine.speculation.num_proposed,
        num_accepted_tokens=0 if engine is None else engine.speculation.num_accepted,
        pixel_bytes=sum(stream.sequence.pixel_bytes for stream in streams if stream.sequence is not None),
        image_cache_capacity_bytes=int(config.image_cache_bytes) if images else 0,
        image_cache_bytes=images.num_bytes if images else 0,
        image_cache_kv_bytes=images.num_kv_bytes if images else 0,
        image_cache_hits=images.num_hits if images else 0,
        image_cache_kv_hits=images.num_kv_hits if images else 0,
        image_cache_misses=images.num_misses if images else 0,
        image_cache_evictions=images.num_evictions if images else 0,
        adapter_bytes=adapter_bytes,
        uptime_seconds=uptime_seconds,
        memory_bytes=memory_by_kind(engine.info, pool.capacity_bytes, adapter_bytes) if engine and pool else {},
    )
