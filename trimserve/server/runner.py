"""What the server needs of the engine: the seam that `engine/runner.py` fills, and tests with a fake."""

from collections.abc import AsyncGenerator
from typing import Protocol

from trimserve.api.chunks import GenerationChunk
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.status import EngineStatus, StepListener

__all__ = ["Runner"]


class Runner(Protocol):
    """An engine with an asyncio face; everything is called in the event loop's thread."""

    @property
    def info(self) -> ModelInfo:
        """The model.

        Raises:
            EngineStopped: it is not loaded yet.
        """

    def watch_steps(self, listener: StepListener) -> None:
        """Tell a listener of every decode step, in a thread of the engine; to be called before `start`."""

    async def start(self) -> None:
        """Load and warm up the model, then take requests.

        Raises:
            Exception: whatever loading or warm-up raised.
        """

    def submit(
        self, request: GenerationRequest, *, deadline: float | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Queue a request; closing the generator, or cancelling its consumer, cancels the request.

        Args:
            request: validated.
            deadline: `time.monotonic()` value, or None.
        Raises:
            TrimserveError: from iteration, any but CheckpointError.
        """

    def status(self) -> EngineStatus:
        """A consistent snapshot; also before `start`."""

    async def death(self) -> BaseException:
        """Wait, for ever in the good case, until the engine of a started runner dies or hangs; the cause."""

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones finish, end the rest with EngineStopped.

        Args:
            grace_seconds: for running requests.
        """
