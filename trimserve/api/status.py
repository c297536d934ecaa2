"""The engine's state at one moment, and the callback that reports each step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["EngineStatus", "StepListener", "WorkersStatus"]

StepListener = Callable[[int, float], None]
"""Called after every decode step with its number of sequences and its seconds of model and sampling. Must not raise."""


@dataclass(frozen=True, slots=True)
class WorkersStatus:
    """A pool of workers that prepare requests, at one moment."""

    num_workers: int
    num_busy: int
    """Those that work on a request."""
    oldest_job_seconds: float
    """For how long one of them has been at its present job, the longest; 0 if all are idle."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine's state at one moment."""

    is_ready: bool
    """Whether requests are accepted, and what was accepted gets done: false before warm-up is done, while draining,
    after a crash, while a worker has been at one job for `step_timeout_seconds`, and while no process that decodes
    images can be started."""
    is_alive: bool
    """False once the engine has died."""
    num_running: int
    """Requests in the batch."""
    num_waiting: int
    """Requests being prepared or in the queue."""
    max_batch: int
    """Most requests that decode together."""
    max_queue: int
    """Most requests in the queue."""
    kv_capacity_bytes: int
    """Size of the page pool that self- and cross-attention KV share."""
    self_kv_bytes: int
    """Self-attention KV in use, in whole pages."""
    cross_kv_bytes: int
    """Cross-attention KV in use, in whole pages."""
    cross_kv_untrimmed_bytes: int
    """What the running requests would hold instead of `cross_kv_bytes` if they were untrimmed."""
    num_preemptions: int
    """Times since the start that a running request lost its pages to more urgent ones."""
    num_recomputed_tokens: int
    """Tokens that were read again after a preemption since the start."""
    num_prefill_passes: int
    """Passes over the layers since the start that read prompts, one or several each."""
    num_proposed_tokens: int
    """Drafts that decode steps have checked since the start."""
    num_accepted_tokens: int
    """Those of them that were what was drawn."""
    pixel_bytes: int
    """Decoded images that requests keep, in the machine's memory, to be computed again."""
    image_cache_capacity_bytes: int
    """Most bytes of visual features, and of their keys and values, that each of the ranks caches."""
    image_cache_bytes: int
    """Bytes of visual features, and of their keys and values, that rank 0 caches now; other ranks cache as many."""
    image_cache_kv_bytes: int
    """Of these, bytes set aside for keys and values."""
    image_cache_hits: int
    """Images found in the cache since the start."""
    image_cache_kv_hits: int
    """Images since the start whose keys and values were found too."""
    image_cache_misses: int
    """Images that had to be encoded since the start."""
    image_cache_evictions: int
    """Images evicted since the start."""
    adapter_bytes: int
    """Bytes of the adapters that are loaded."""
    uptime_seconds: float
    """Since the engine became ready; 0 until then."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Memory of the model's device by kind, as in `trimserve_device_memory_bytes`; empty before the model is loaded."""
    decoder_deaths: Mapping[str, int] = field(default_factory=dict)
    """Processes that ended with an image file in hand since the start, by cause."""
    memory_left_bytes: int = 0
    """Memory of the machine that could still be allocated within the limits of its control groups."""
    workers: Mapping[str, WorkersStatus] = field(default_factory=dict)
    """By pool, as in `trimserve_preparation_workers`."""

    @property
    def kv_usage_ratio(self) -> float:
        """Share of the page pool that is in use; 0 before there is one."""
        return (self.self_kv_bytes + self.cross_kv_bytes) / max(1, self.kv_capacity_bytes)
