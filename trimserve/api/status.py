"""What the engine is doing: at one moment, for the server's status and gauges, and with every step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["EngineStatus", "StepListener"]

StepListener = Callable[[int, float], None]
"""Hears of every decode step: how many sequences it had, and the seconds of model and sampling. Must not raise."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing at this moment."""

    is_ready: bool
    """Whether requests are taken: false before warm-up is done, while draining and after a crash."""
    is_alive: bool
    """Whether it can be ready, now or later: false once the engine has died."""
    num_running: int
    """Requests with a place in the batch."""
    num_waiting: int
    """Requests being prepared or in the queue."""
    max_batch: int
    """Most requests that decode together."""
    max_queue: int
    """Most requests in the queue."""
    kv_capacity_bytes: int
    """All pages of the pool that self- and cross-attention KV share."""
    self_kv_bytes: int
    """Self-attention KV held now, whole pages."""
    cross_kv_bytes: int
    """Cross-attention KV held now, whole pages."""
    cross_kv_untrimmed_bytes: int
    """What the requests that hold `cross_kv_bytes` would hold untrimmed."""
    image_cache_capacity_bytes: int
    """Most bytes of visual features that are kept for another question."""
    image_cache_bytes: int
    """Bytes of visual features kept now."""
    image_cache_hits: int
    """Images found in the cache since the start."""
    image_cache_misses: int
    """Images that had to be encoded since the start."""
    image_cache_evictions: int
    """Images that made room for others since the start."""
    uptime_seconds: float
    """Since the engine became ready; 0 before."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of the model's device, by kind, see `memory.memory_by_kind`; empty before the model is loaded."""
