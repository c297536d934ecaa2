"""When each stage of a request ended. Stages follow each other without a gap: they add up to the total."""

from collections.abc import Iterable, Iterator

from trimserve.api.chunks import StageSpan, Timings
from trimserve.engine.answer import Answer
from trimserve.executor.plan import PrefillReport

__all__ = ["Stages"]


class Stages:
    """Of one request, up to the end of its first prefill; its answers share it. Times are `time.monotonic()`."""

    def __init__(self, submitted_at: float) -> None:
        """Nothing has ended yet.

        Args:
            submitted_at: when the request came.
        """
        self.submitted_at = submitted_at
        self.spans: list[StageSpan] = []
        """What a trace shows, up to the first token."""
        self._preprocess_seconds = 0.0
        self._began_at = self._encoded_at = self._prefilled_at = submitted_at

    def prepared(self, seconds: float, image_spans: Iterable[StageSpan]) -> None:
        """Note how long preparing the prompt took, and each of its images."""
        self._preprocess_seconds = seconds
        self.spans.extend(image_spans)

    def prefilled(self, report: PrefillReport) -> None:
        """Note what the first prefill took."""
        self._began_at, self._encoded_at, self._prefilled_at = report.times
        self.spans.extend(self._of_prefill(report))

    def _of_prefill(self, report: PrefillReport) -> Iterator[StageSpan]:
        yield StageSpan("queue", self.submitted_at, self._began_at)
        yield StageSpan("vision_encode", self._began_at, self._encoded_at)
        for began_at, selected_at, gathered_at in report.trim_times:
            yield StageSpan("trim_select", began_at, selected_at)
            yield StageSpan("trim_gather", selected_at, gathered_at)
        yield StageSpan("prefill", self._encoded_at, self._prefilled_at)

    def timings(self, answer: Answer, ended_at: float) -> Timings:
        """Of one of its answers."""
        return Timings(
            queue_seconds=self._began_at - self.submitted_at - self._preprocess_seconds,
            preprocess_seconds=self._preprocess_seconds,
            vision_seconds=self._encoded_at - self._began_at,
            prefill_seconds=self._prefilled_at - self._encoded_at,
            decode_seconds=ended_at - self._prefilled_at,
            time_to_first_token_seconds=answer.first_token_at - self.submitted_at,
            total_seconds=ended_at - self.submitted_at,
            image_decode_seconds=self._seconds_of("image_decode"),
            trim_select_seconds=self._seconds_of("trim_select"),
            trim_gather_seconds=self._seconds_of("trim_gather"),
            detokenize_seconds=answer.detokenize_seconds,
        )

    def _seconds_of(self, stage: str) -> float:
        return sum(span.end - span.begin for span in self.spans if span.stage == stage)
