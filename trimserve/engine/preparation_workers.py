"""Who prepares requests beside the engine: threads that tokenise, threads for images, processes that open files."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from trimserve.api.status import EngineStatus
from trimserve.engine.lookahead import Lookahead, Ticket
from trimserve.engine.memory import available_bytes
from trimserve.engine.stream import Stream
from trimserve.engine.workers import Job, Workers
from trimserve.imaging.pool import DecoderPool

__all__ = ["PreparationWorkers"]

_PREPARED_AHEAD = 2
"""Requests whose decoded images wait for the engine while the workers decode those of others."""


class PreparationWorkers:
    """Starts and stops them together, and tells how they are."""

    def __init__(self, num_threads: int, decoders: DecoderPool | None) -> None:
        """Start nothing yet.

        Args:
            num_threads: of each of the two pools.
            decoders: opens image files; None if the threads do so themselves.
        """
        self.text = Workers(num_threads, "trimserve-text")
        self.images = Workers(num_threads, "trimserve-image")
        self._decoders = decoders
        self._lookahead = Lookahead(num_threads + _PREPARED_AHEAD)

    def start(self) -> None:
        """Start processes; threads start with their first job."""
        if self._decoders is not None:
            self._decoders.start()

    def stop(self) -> None:
        """Begin no more jobs, and end the processes."""
        self.text.stop()
        self.images.stop()
        if self._decoders is not None:
            self._decoders.close()

    def submit_image(self, stream: Stream, job: Job) -> None:
        """Queue the decoding of a request's next image; its first one waits while images of others are not taken.

        Args:
            stream: of the request.
            job: must not raise.
        """
        begin = partial(self.images.submit, stream.urgency, job)
        if stream.ticket is None:
            stream.ticket = Ticket(stream.urgency, begin)
            self._lookahead.enter(stream.ticket)
        else:
            begin()

    def images_taken(self, stream: Stream) -> None:
        """A request's images are with the engine, or nobody wants them any more."""
        if stream.ticket is not None:
            self._lookahead.leave(stream.ticket)

    def complete(self, status: EngineStatus, timeout_seconds: float) -> EngineStatus:
        """Add to a status what these workers are about.

        Args:
            status: of the engine.
            timeout_seconds: a worker that has been at one job for longer makes it not ready, as do processes that
                cannot be started.
        """
        workers = {"text": self.text.status(), "image": self.images.status()}
        hangs = any(pool.oldest_job_seconds > timeout_seconds for pool in workers.values())
        can_decode = self._decoders is None or self._decoders.is_able
        deaths: Mapping[str, int] = {} if self._decoders is None else dict(self._decoders.deaths)
        return replace(
            status,
            is_ready=status.is_ready and not hangs and can_decode,
            decoder_deaths=deaths,
            memory_left_bytes=available_bytes("cpu"),
            workers=workers,
        )
