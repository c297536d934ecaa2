"""Metrics of what the engine holds and has counted, looked up once per scrape from its status."""

from collections.abc import Callable
from threading import Lock

from prometheus_client import Counter

from trimserve.api.status import EngineStatus
from trimserve.server.process_metrics import ProcessMetrics

__all__ = ["EngineMetrics"]


class EngineMetrics(ProcessMetrics):
    """Declares them, and shows a status; `Metrics` adds those of calls and requests."""

    def __init__(self) -> None:
        """Show nothing yet."""
        super().__init__()
        self.before_scrape: list[Callable[[], object]] = []
        """Called by `refresh`, such as to look whether files have changed. Must not raise."""
        self._lock = Lock()
        self._totals: dict[str, int] = {}

    def refresh(self, status: EngineStatus | None) -> None:
        """Set the gauges that are looked up, once per scrape.

        Args:
            status: of the engine; None if the event loop does not tell, and then no request is answered either.
        """
        for look in self.before_scrape:
            look()
        if status is None:
            self.model_ready.set(0)
        else:
            self._show_status(status)

    def _show_status(self, status: EngineStatus) -> None:
        self.model_ready.set(status.is_ready)
        self.requests_running.set(status.num_running)
        self.requests_waiting.set(status.num_waiting)
        self.kv_cache_used_bytes.labels("self").set(status.self_kv_bytes)
        self.kv_cache_used_bytes.labels("cross").set(status.cross_kv_bytes)
        self.cross_kv_cache_untrimmed_bytes.set(status.cross_kv_untrimmed_bytes)
        self.kv_cache_capacity_bytes.set(status.kv_capacity_bytes)
        self.kv_cache_usage_ratio.set(status.kv_usage_ratio)
        self.pixel_bytes.set(status.pixel_bytes)
        self.image_cache_used_bytes.set(status.image_cache_bytes)
        self.image_cache_kv_bytes.set(status.image_cache_kv_bytes)
        self.image_cache_capacity_bytes.set(status.image_cache_capacity_bytes)
        for kind, num_bytes in status.memory_bytes.items():
            self.device_memory_bytes.labels(kind).set(num_bytes)
        self.memory_left_bytes.set(status.memory_left_bytes)
        for pool, workers in status.workers.items():
            self.preparation_workers.labels(pool).set(workers.num_workers)
            self.preparation_workers_busy.labels(pool).set(workers.num_busy)
            self.preparation_oldest_job_seconds.labels(pool).set(workers.oldest_job_seconds)
        with self._lock:
            self._raise_to("preemptions", self.preemptions, status.num_preemptions)
            self._raise_to("recomputed", self.recomputed_tokens, status.num_recomputed_tokens)
            self._raise_to("passes", self.prefill_passes, status.num_prefill_passes)
            self._raise_to("proposed", self.proposed_tokens, status.num_proposed_tokens)
            self._raise_to("accepted", self.accepted_tokens, status.num_accepted_tokens)
            self._raise_to("hits", self.image_cache_hits, status.image_cache_hits)
            self._raise_to("kv hits", self.image_cache_kv_hits, status.image_cache_kv_hits)
            self._raise_to("misses", self.image_cache_misses, status.image_cache_misses)
            self._raise_to("evictions", self.image_cache_evictions, status.image_cache_evictions)
            for cause, total in status.decoder_deaths.items():
                self._raise_to(cause, self.decoder_deaths.labels(cause), total)

    def _raise_to(self, name: str, counter: Counter, total: int) -> None:
        """Raise a counter to a total that the engine keeps."""
        counter.inc(max(0, total - self._totals.get(name, 0)))
        self._totals[name] = max(total, self._totals.get(name, 0))

    def _declare_engine(self) -> None:
        self.model_ready = self._gauge("trimserve_model_ready", "1 while requests are taken, else 0.")
        self.requests_running = self._gauge("trimserve_requests_running", "Requests that the engine works on.")
        self.requests_waiting = self._gauge("trimserve_requests_waiting", "Requests in the queue.")
        self.kv_cache_used_bytes = self._gauge(
            "trimserve_kv_cache_used_bytes",
            "KV in use now, whole pages, of self- and of cross-attention layers.",
            {"kind": ("self", "cross")},
        )
        self.kv_cache_capacity_bytes = self._gauge(
            "trimserve_kv_cache_capacity_bytes", "Bytes of the page pool that self- and cross-attention KV share."
        )
        self.kv_cache_usage_ratio = self._gauge(
            "trimserve_kv_cache_usage_ratio",
            "Share of the page pool that is in use, from 0 to 1: for routers and autoscalers, which read one number.",
        )
        self.preemptions = self._counter(
            "trimserve_preemptions_total",
            "Times that a running request gave its pages to more urgent ones; it is computed again and goes on.",
        )
        self.recomputed_tokens = self._counter(
            "trimserve_recomputed_tokens_total",
            "Tokens of prompts and answers that were read again after a preemption.",
        )
        self.prefill_passes = self._counter(
            "trimserve_prefill_passes_total",
            "Passes over the layers that read prompts: several small ones that waited together, or one.",
        )
        self.proposed_tokens = self._counter(
            "trimserve_proposed_tokens_total", "Drafts that decode steps checked (`speculation`), a row each."
        )
        self.accepted_tokens = self._counter(
            "trimserve_accepted_tokens_total", "Drafts that were what was drawn: tokens that took no step of their own."
        )
        self.pixel_bytes = self._gauge(
            "trimserve_pixel_bytes",
            "Decoded images of requests that wait for the engine or run, in the machine's memory: kept to compute a "
            "request again.",
        )
        self.cross_kv_cache_untrimmed_bytes = self._gauge(
            "trimserve_cross_kv_cache_untrimmed_bytes",
            "What running requests would hold of cross-attention KV untrimmed.",
        )
        self.device_memory_bytes = self._gauge(
            "trimserve_device_memory_bytes",
            "Memory of the model's device: its weights, those of LoRA adapters, the page pool, and what is free; of a "
            "GPU also what torch has reserved, and how much of that is allocated.",
            {"kind": ("weights", "adapters", "kv", "free", "allocated", "reserved")},
        )

    def _declare_images(self) -> None:
        self.image_cache_hits = self._counter(
            "trimserve_image_cache_hits_total", "Images whose visual features were still known: not encoded again."
        )
        self.image_cache_kv_hits = self._counter(
            "trimserve_image_cache_kv_hits_total",
            "Images whose cross-attention keys and values were known too: only those that a question needs beside are "
            "computed.",
        )
        self.image_cache_misses = self._counter(
            "trimserve_image_cache_misses_total", "Images that went through the vision encoder."
        )
        self.image_cache_evictions = self._counter(
            "trimserve_image_cache_evictions_total", "Images whose visual features made room for others'."
        )
        self.decoder_deaths = self._counter(
            "trimserve_decoder_deaths_total",
            "Processes that ended with an image file in hand: too much processor time, no answer in time, or a crash.",
            {"cause": ("processor_time", "wall_clock", "crash")},
        )
        self.image_cache_used_bytes = self._gauge(
            "trimserve_image_cache_used_bytes",
            "Bytes of the visual features that are kept for another question, with their keys and values, in each of "
            "tensor_parallel processes.",
        )
        self.image_cache_kv_bytes = self._gauge(
            "trimserve_image_cache_kv_bytes", "Of these, bytes set aside for keys and values."
        )
        self.image_cache_capacity_bytes = self._gauge(
            "trimserve_image_cache_capacity_bytes", "Most bytes that the image cache holds."
        )
