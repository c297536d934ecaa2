"""A request before the engine works on it: tokenised first, then its images one by one.

In steps, so that other requests can come between two images. It knows no thread and no queue.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

from trimserve.api.chunks import StageSpan
from trimserve.api.prompt import ImageFile, Prompt
from trimserve.engine.processor import Processor
from trimserve.engine.sequence import Sequence
from trimserve.errors import OutOfMemory, RequestFailed, TrimserveError
from trimserve.executor.failures import is_out_of_memory
from trimserve.model.prepared import PreparedImage, PreparedPrompt

__all__ = ["Preparation", "why_not_prepared"]

log = logging.getLogger(__name__)


class Preparation:
    """Makes a `Sequence` of a request; each image file is let go as soon as it is decoded."""

    def __init__(
        self,
        processor: Processor,
        prompt: Prompt,
        make: Callable[[tuple[int, ...]], Sequence],
        check: Callable[[Sequence], None],
    ) -> None:
        """Do nothing yet.

        Args:
            processor: tokenises and decodes images.
            prompt: what was asked.
            make: makes the sequence of its token ids; may raise InvalidRequest.
            check: refuses a prepared sequence that can never run, by raising InvalidRequest.
        """
        self._processor = processor
        self._todo: tuple[Prompt, Callable[[tuple[int, ...]], Sequence]] | None = prompt, make
        self._check = check
        self._sequence: Sequence | None = None
        self._files: deque[ImageFile] = deque()
        self._prepared = processor.prepare_images(_taken(self._files))
        self._images: list[PreparedImage] = []
        self._image_spans: list[StageSpan] = []
        self._seconds = 0.0

    def advance(self) -> Sequence | None:
        """Take the next step: the first one tokenises and is quick, each other one decodes an image.

        Returns:
            The sequence after the last step, None after any other.
        Raises:
            InvalidRequest: what `Processor.tokenize`, `Sequence`, `Processor.prepare_images` or the check refuses.
        """
        started_at = time.monotonic()
        if self._sequence is None:
            self._sequence = self._tokenize()
        else:
            self._images.append(next(self._prepared))
            self._image_spans.append(StageSpan("image_decode", started_at, time.monotonic()))
        self._seconds += time.monotonic() - started_at
        if self._files:
            return None
        token_ids = self._sequence.prompt_token_ids
        self._sequence.prepared(PreparedPrompt(token_ids, tuple(self._images)), self._seconds, self._image_spans)
        self._check(self._sequence)
        return self._sequence

    def _tokenize(self) -> Sequence:
        todo, self._todo = self._todo, None  # both hold the image files
        assert todo is not None, "a preparation that failed is not advanced again"
        prompt, make = todo
        tokenized = self._processor.tokenize(prompt)
        self._files.extend(tokenized.images)
        return make(tokenized.token_ids)


def _taken(files: deque[ImageFile]) -> Iterator[ImageFile]:
    """The files from the first one on; only who asked for a file holds it."""
    while files:
        yield files.popleft()


def why_not_prepared(error: BaseException, request_id: str) -> TrimserveError:
    """What a client is told of an error that a step raised; a mistake of ours is logged."""
    if isinstance(error, TrimserveError):
        return error
    log.error("preparing a request failed", exc_info=error, extra={"request_id": request_id})
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory while request {request_id} was prepared")
    return RequestFailed(f"preparing request {request_id} failed")
