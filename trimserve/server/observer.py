"""Updates the metrics and the trace of one generation request from its chunks and its end."""

import asyncio
import time

from trimserve.api.chunks import Finished, GenerationChunk, StageSpan, Started, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.errors import (
    DeadlinePassed,
    EngineBusy,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    RequestFailed,
    UnknownAdapter,
)
from trimserve.server.metrics import NO_POLICY, STAGES, Metrics
from trimserve.server.tracing import current_trace

__all__ = ["RequestObserver"]


class RequestObserver:
    """Follows one request from its arrival to its last chunk, or to the exception that ended it."""

    def __init__(self, metrics: Metrics, method: str) -> None:
        """Start the clock.

        Args:
            metrics: to update.
            method: `Generate` or `GenerateStream`.
        """
        self._metrics = metrics
        self._method = method
        self._arrived = time.monotonic()
        self._first_token: float | None = None
        self._last_tokens: dict[int, float] = {}
        self._num_answers = 1
        self._num_tokens = 0
        self._is_trimming = False
        self._inter_token = metrics.inter_token_latency_seconds.labels("off")
        self._policy = NO_POLICY
        self._started: Started | None = None
        self._trace = current_trace()

    def accepted(self, request: GenerationRequest) -> None:
        """The request passed its checks."""
        self._num_answers = request.num_choices
        self._is_trimming = request.trim.enabled
        self._policy = request.trim.policy
        self._inter_token = self._metrics.inter_token_latency_seconds.labels(self._trimming)

    def saw(self, chunk: GenerationChunk) -> None:
        """A chunk is about to be sent."""
        match chunk:
            case TokenDelta():  # first, because it is by far the most frequent
                self._saw_tokens(len(chunk.token_ids), chunk.choice)
            case Started():
                self._saw_started(chunk)
            case Finished():
                self._num_answers -= 1
                self._num_tokens += chunk.num_generated_tokens
                if not self._num_answers:
                    self._saw_finished(chunk)

    def failed(self, error: BaseException, *, is_past_deadline: bool) -> None:
        """The request ended without its last chunk.

        Args:
            error: what ended it; CancelledError and GeneratorExit mean that the client went away.
            is_past_deadline: whether the call's deadline has passed, which also arrives as CancelledError.
        """
        self._trace_decode()
        match error:
            case InvalidRequest() | UnknownAdapter():
                finish_reason = "rejected"
            case OutOfMemory():
                self._metrics.engine_errors.labels("oom").inc()
                finish_reason = "error"
            case EngineBusy():
                finish_reason = self._rejected("queue_full")
            case EngineStopped():
                finish_reason = self._rejected("stopped") if self._started is None else self._cut("shutdown")
            case DeadlinePassed() if self._started is None:
                self._rejected("deadline")
                finish_reason = "deadline"
            case DeadlinePassed():
                finish_reason = self._cut("deadline")
            case asyncio.CancelledError() | GeneratorExit():
                finish_reason = self._cut("deadline" if is_past_deadline else "client")
            case _:
                kind = "model" if isinstance(error, RequestFailed) else "internal"
                self._metrics.engine_errors.labels(kind).inc()
                finish_reason = "error"
        self._metrics.requests.labels(self._method, finish_reason).inc()

    def _rejected(self, reason: str) -> str:
        self._metrics.admission_rejections.labels(reason).inc()
        return "rejected"

    def _cut(self, reason: str) -> str:
        self._metrics.cancelled_requests.labels(reason).inc()
        return "deadline" if reason == "deadline" else "cancelled"

    @property
    def _trimming(self) -> str:
        return "on" if self._is_trimming else "off"

    def _saw_started(self, chunk: Started) -> None:
        self._started = chunk
        metrics = self._metrics
        metrics.prompt_tokens.inc(chunk.num_prompt_tokens)
        metrics.request_prompt_tokens.observe(chunk.num_prompt_tokens)
        metrics.request_images.observe(len(chunk.images))
        metrics.batch_size.labels("prefill").observe(1)
        valid = sum(image.valid_features for image in chunk.images)
        kept = sum(image.kept_features for image in chunk.images)
        metrics.visual_features.labels("valid").inc(valid)
        metrics.visual_features.labels("kept").inc(kept)
        metrics.visual_features.labels("dropped").inc(valid - kept)
        metrics.visual_features.labels("merged").inc(sum(image.merged_features for image in chunk.images))
        metrics.visual_features.labels("padding").inc(sum(image.padding_features for image in chunk.images))
        is_asked = chunk.images and self._is_trimming
        if is_asked:
            metrics.kept_fraction.labels(self._policy).observe(sum(image.held_rows for image in chunk.images) / valid)
        policy = self._policy if is_asked else NO_POLICY
        metrics.trim_requests.labels(policy, self._trim_outcome(chunk, kept < valid)).inc()
        if self._trace is not None:
            self._trace.describe({"gen_ai.usage.input_tokens": chunk.num_prompt_tokens})
            for span in chunk.spans:
                self._trace.add_stage(span)

    def _trim_outcome(self, chunk: Started, has_dropped: bool) -> str:
        if not self._is_trimming:
            return "disabled"
        if not chunk.images:
            return "bypassed_text_only"
        return "trimmed" if has_dropped else "bypassed_no_gain"

    def _saw_tokens(self, num_tokens: int, choice: int) -> None:
        if not num_tokens:
            return
        now = time.monotonic()
        self._metrics.generation_tokens.inc(num_tokens)
        if self._first_token is None:
            self._first_token = now
            seconds = self._metrics.time_to_first_token_seconds.labels(self._trimming)
            seconds.observe(now - self._arrived, self._exemplar)
        # Tokens of one delta left together: each counts for its share of the gap before it.
        last = self._last_tokens.get(choice, self._arrived)
        self._inter_token.observe((now - last) / num_tokens, num_tokens - (choice not in self._last_tokens))
        self._last_tokens[choice] = now

    def _saw_finished(self, chunk: Finished) -> None:
        metrics, timings = self._metrics, chunk.timings
        metrics.requests.labels(self._method, chunk.reason.value).inc()
        duration = time.monotonic() - self._arrived
        metrics.request_duration_seconds.labels(self._method, self._trimming).observe(duration, self._exemplar)
        last = self._last_tokens.get(chunk.choice)
        if self._first_token is not None and last is not None and chunk.num_generated_tokens > 1:
            per_token = (last - self._first_token) / (chunk.num_generated_tokens - 1)
            metrics.time_per_output_token_seconds.labels(self._trimming).observe(per_token)
        metrics.request_generation_tokens.observe(self._num_tokens)
        metrics.queue_time_seconds.observe(timings.queue_seconds)
        for stage, name in STAGES.items():
            metrics.stage_duration_seconds.labels(stage).observe(getattr(timings, name))
        if self._started is not None and self._started.images:
            self._saw_cross_kv(chunk)
            if self._is_trimming:
                metrics.trim_select_seconds.labels(self._policy).observe(timings.trim_select_seconds)
        self._trace_decode()
        if self._trace is not None:
            reasons: list[str] = [chunk.reason.value]
            tokens = self._num_tokens
            self._trace.describe({"gen_ai.usage.output_tokens": tokens, "gen_ai.response.finish_reasons": reasons})

    @property
    def _exemplar(self) -> dict[str, str] | None:
        """Links a bucket to the trace of one request that it counts."""
        trace_id = None if self._trace is None else self._trace.trace_id
        return None if trace_id is None else {"trace_id": trace_id}

    def _trace_decode(self) -> None:
        """End the last stage, if it has begun."""
        if self._trace is not None and self._started is not None and self._started.spans:
            self._trace.add_stage(StageSpan("decode", self._started.spans[-1].end, time.monotonic()))

    def _saw_cross_kv(self, chunk: Finished) -> None:
        account, metrics = chunk.cross_kv, self._metrics
        metrics.request_cross_kv_bytes.labels("untrimmed").observe(account.untrimmed)
        metrics.request_cross_kv_bytes.labels("held").observe(account.held)
        metrics.cross_kv_bytes_saved.labels("padding").inc(account.saved_by_padding)
        metrics.cross_kv_bytes_saved.labels("trimming").inc(account.saved_by_trimming)
        metrics.cross_kv_bytes_saved.labels("visibility").inc(account.saved_by_visibility)
