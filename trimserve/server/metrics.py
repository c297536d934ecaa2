"""Every metric, declared once: name, meaning, labels with their known values, buckets.

Here are those of RPCs and requests; `engine_metrics.py` has what the engine holds, `process_metrics.py` the process and
the calls that were refused.
`docs/metrics.md` is generated from all three. Series of known label values start at 0, so that rates work from the
first event. One process serves one model, so only `trimserve_model_info` names it. `observer.py` and the transports
update what is declared here; the names of policies and RPCs are handed in.
"""

import platform
from collections.abc import Collection, Sequence
from importlib.metadata import version

from prometheus_client import ProcessCollector

from trimserve import __version__
from trimserve.api.info import ModelInfo
from trimserve.server.engine_metrics import EngineMetrics

__all__ = ["NO_POLICY", "RPC_CODES", "STAGES", "Metrics"]

METHODS = ("Generate", "GenerateStream")
"""Of HTTP, too: a whole answer counts as `Generate`, a streamed one as `GenerateStream`."""
TRIMMING = ("on", "off")
NO_POLICY = "none"
STAGES = {
    "preprocess": "preprocess_seconds",
    "image_decode": "image_decode_seconds",
    "vision_encode": "vision_seconds",
    "prefill": "prefill_seconds",
    "trim_select": "trim_select_seconds",
    "trim_gather": "trim_gather_seconds",
    "decode": "decode_seconds",
    "detokenize": "detokenize_seconds",
}
"""Stages of one request, and the fields of `Timings` that hold them."""

RPC_CODES = (
    "OK",
    "CANCELLED",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
)
"""Codes that RPCs can end with."""

# Seconds. Handling covers whole answers, so it ends later than the ecosystem's usual 10 s.
HANDLING = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
DURATION = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
FIRST_TOKEN = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
PER_TOKEN = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGE = (0.0001, 0.00025, 0.0006, 0.0015, 0.004, 0.01, 0.025, 0.06, 0.15, 0.4, 1, 2.5, 6, 10, 30, 60, 120)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
IMAGES = (0, 1, 2, 3, 4, 8, 16)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FRACTION = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
KIB, MIB = 2**10, 2**20
# Bytes: the embedded model's requests take some hundred KiB, one 4-tile image of the 11B model 200 MiB.
CROSS_KV = (
    *(size * KIB for size in (0, 16, 64, 256)),
    *(size * MIB for size in (1, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024, 2048)),
)


class Metrics(EngineMetrics):
    """All metrics of one server, on a registry of its own."""

    def __init__(self, policies: Collection[str], rpcs: Sequence[tuple[str, str, str]]) -> None:
        """Declare everything.

        Args:
            policies: names of all trimming policies.
            rpcs: (grpc_type, grpc_service, grpc_method) of every RPC.
        """
        super().__init__()
        self._policies = tuple(policies)
        self._rpcs = rpcs
        self._declare_rpcs()
        self._declare_callers()
        self._declare_requests()
        self._declare_latencies()
        self._declare_tokens_and_features()
        self._declare_engine()
        self._declare_images()
        self._declare_infos()
        self._declare_process()
        ProcessCollector(registry=self.registry)

    def saw_step(self, num_sequences: int, seconds: float) -> None:
        """Count a decode step; the `StepListener` of the engine."""
        self._decode_batches.observe(num_sequences)
        self._decode_steps.observe(seconds)

    def describe_model(self, info: ModelInfo) -> None:
        """Publish `trimserve_model_info` once the model is loaded."""
        weights = (info.dtype, info.quantization, info.device)
        ratios = (f"{info.default_k_ratio:g}", f"{info.default_merge_ratio:g}")
        self.model_info.labels(info.model_id, info.revision, *weights, *ratios).set(1)

    def _declare_rpcs(self) -> None:
        rpc = {"grpc_type": (), "grpc_service": (), "grpc_method": ()}
        self.rpcs_started = self._counter("grpc_server_started_total", "RPCs that began.", rpc)
        self.rpcs_handled = self._counter(
            "grpc_server_handled_total", "RPCs that ended, by status code.", {**rpc, "grpc_code": RPC_CODES}
        )
        self.rpc_messages_received = self._counter("grpc_server_msg_received_total", "Messages that clients sent.", rpc)
        self.rpc_messages_sent = self._counts(
            "grpc_server_msg_sent_total", "Messages that were sent to clients.", tuple(rpc), self._rpcs
        )
        self.rpc_handling_seconds = self._histogram(
            "grpc_server_handling_seconds", "From an RPC's begin until its end.", HANDLING, rpc
        )
        for labels in self._rpcs:
            for counter in (self.rpcs_started, self.rpc_messages_received):
                counter.labels(*labels)
            self.rpc_handling_seconds.labels(*labels)
            for code in RPC_CODES:
                self.rpcs_handled.labels(*labels, code)

    def _declare_requests(self) -> None:
        self.requests = self._counter(
            "trimserve_requests_total",
            "Generation requests that ended: one per RPC. Rejected ones were refused before any work.",
            {
                "method": METHODS,
                "finish_reason": ("stop", "length", "cancelled", "deadline", "error", "rejected"),
            },
        )
        self.admission_rejections = self._counter(
            "trimserve_admission_rejections_total",
            "Valid requests that were refused before any work: the queue was full, the deadline passed in "
            "the queue, or the engine was starting, draining or dead.",
            {"reason": ("queue_full", "deadline", "stopped")},
        )
        self.cancelled_requests = self._counter(
            "trimserve_cancelled_requests_total",
            "Requests that ended early: the client went away, the deadline passed, or the server stopped.",
            {"reason": ("client", "deadline", "shutdown")},
        )
        self.engine_errors = self._counter(
            "trimserve_engine_errors_total",
            "Requests that failed through no fault of theirs: in the model, out of memory, or by a defect elsewhere.",
            {"kind": ("model", "oom", "internal")},
        )
        self.trim_requests = self._counter(
            "trimserve_trim_requests_total",
            "Requests that were prefilled, by what trimming did: dropped or merged features, was off, had no image, "
            "or kept every feature. The policy is none where none was asked.",
            {
                "policy": (NO_POLICY, *self._policies),
                "outcome": ("trimmed", "disabled", "bypassed_text_only", "bypassed_no_gain"),
            },
        )

    def _declare_latencies(self) -> None:
        trimming = {"trimming": TRIMMING}
        self.request_duration_seconds = self._histogram(
            "trimserve_request_duration_seconds",
            "From a request's arrival until its last message, of requests that finished.",
            DURATION,
            {"method": METHODS, **trimming},
        )
        self.time_to_first_token_seconds = self._histogram(
            "trimserve_time_to_first_token_seconds",
            "From a request's arrival until its first token.",
            FIRST_TOKEN,
            trimming,
        )
        self.inter_token_latency_seconds = self._tallies(
            "trimserve_inter_token_latency_seconds",
            "Between one token and the next of a request.",
            PER_TOKEN,
            trimming,
        )
        self.time_per_output_token_seconds = self._histogram(
            "trimserve_request_time_per_output_token_seconds",
            "Mean over a finished request of the time between tokens, of requests of 2 tokens and more.",
            PER_TOKEN,
            trimming,
        )
        self.queue_time_seconds = self._histogram(
            "trimserve_queue_time_seconds", "From arrival at the engine until work began.", QUEUE
        )
        self.stage_duration_seconds = self._tallies(
            "trimserve_stage_duration_seconds",
            "Time that one finished request spent in each stage, all its steps together; decode_step is one step of "
            "the whole batch. image_decode is a part of preprocess, trim_select and trim_gather are of prefill, "
            "detokenize is of decode.",
            STAGE,
            {"stage": (*STAGES, "decode_step")},
        )
        self._decode_steps = self.stage_duration_seconds.labels("decode_step")
        self.batch_size = self._tallies(
            "trimserve_batch_size", "Requests that one step worked on.", BATCH, {"phase": ("prefill", "decode")}
        )
        self._decode_batches = self.batch_size.labels("decode")

    def _declare_tokens_and_features(self) -> None:
        self.prompt_tokens = self._counter("trimserve_prompt_tokens_total", "Prompt tokens that were prefilled.")
        self.generation_tokens = self._counts(
            "trimserve_generation_tokens_total", "Tokens that were sent to clients.", (), [()]
        ).labels()
        self.request_prompt_tokens = self._histogram(
            "trimserve_request_prompt_tokens", "Prompt tokens of one request.", TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "trimserve_request_generation_tokens", "Tokens of all choices of a finished request.", TOKENS
        )
        self.request_images = self._histogram("trimserve_request_images", "Images of one request.", IMAGES)
        self.visual_features = self._counter(
            "trimserve_visual_features_total",
            "Visual features of prefilled requests. valid = kept + dropped; padding is not part of valid, and merged "
            "are the rows that dropped ones became.",
            {"state": ("valid", "kept", "dropped", "padding", "merged")},
        )
        self.kept_fraction = self._histogram(
            "trimserve_kept_fraction",
            "Rows held, kept features and merged ones, over valid features of one request with images and trimming "
            "on: measured, not k_ratio.",
            FRACTION,
            {"policy": self._policies},
        )
        self.trim_select_seconds = self._histogram(
            "trimserve_trim_select_seconds",
            "The stage trim_select of one finished request with images and trimming on: next to nothing where an image "
            "remembered what a policy chose of it.",
            STAGE,
            {"policy": self._policies},
        )
        self.request_cross_kv_bytes = self._histogram(
            "trimserve_request_cross_kv_bytes",
            "Cross-attention KV of one finished request with images: untrimmed, and as held.",
            CROSS_KV,
            {"state": ("untrimmed", "held")},
        )
        self.cross_kv_bytes_saved = self._counter(
            "trimserve_cross_kv_bytes_saved_total",
            "Cross-attention KV that finished requests did not hold, by cause; only trimming is lossy.",
            {"cause": ("padding", "trimming", "visibility")},
        )

    def _declare_infos(self) -> None:
        model_labels = ("model_id", "revision", "dtype", "quantization", "device")
        self.model_info = self._gauge(
            "trimserve_model_info",
            "1, with the served model in its labels.",
            dict.fromkeys((*model_labels, "default_k_ratio", "default_merge_ratio"), ()),
        )
        self.build_info = self._gauge(
            "trimserve_build_info",
            "1, with versions in its labels.",
            {"version": (), "python": (), "torch": (), "grpcio": ()},
        )
        versions = (__version__, platform.python_version(), version("torch"), version("grpcio"))
        self.build_info.labels(*versions).set(1)
