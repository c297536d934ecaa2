"""What the server needs of an engine: the protocol that `engine/runner.py` satisfies, and a fake in tests."""

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Protocol

from trimserve.api.adapter import AdapterInfo, LoadedAdapter
from trimserve.api.chunks import GenerationChunk
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.status import EngineStatus, StepListener

__all__ = ["Backend"]


class Backend(Protocol):
    """An engine with an asyncio interface; every method is called on the event loop's thread."""

    @property
    def info(self) -> ModelInfo:
        """The model.

        Raises:
            EngineStopped: it is not loaded yet.
        """

    def token_bytes(self, token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """What each token adds to a text, in UTF-8; a part of a code point where a token is no more.

        Raises:
            EngineStopped: the model is not loaded yet.
        """

    def watch_steps(self, listener: StepListener) -> None:
        """Report every decode step to a listener, on a thread of the engine; to be called before `start`."""

    async def start(self) -> None:
        """Load and warm up the model, then accept requests.

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

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that requests may name."""

    async def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Load an adapter beside the requests that run; goes on if nobody waits for it any more.

        Args:
            name: what requests will call it.
            folder: where it lies.
        Raises:
            AdapterError: it cannot be used with the model.
            AdapterExists: there is one of that name.
            OutOfMemory: there is no memory for it.
            EngineStopped: not ready, draining or dead.
        """

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter, wait for those that have it, and forget it.

        Args:
            name: what requests call it.
        Raises:
            UnknownAdapter: it is not loaded.
            EngineStopped: not ready, draining or dead.
        """

    def status(self) -> EngineStatus:
        """A consistent snapshot; also available before `start`."""

    async def death(self) -> BaseException:
        """Wait until a started engine dies or hangs, and return the cause; a healthy engine never returns."""

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, let running ones finish, end the rest with EngineStopped.

        Args:
            grace_seconds: for running requests.
        """
