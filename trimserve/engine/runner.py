"""The asyncio front of the engine.

    event loop      submit() -> queue bound, deadline -> chunks of one request, in order
    text workers    Processor.tokenize: the first step of a Preparation, quick
    image workers   Processor.prepare_images: the other steps, one image at a time, so that urgent requests come
                    between; a process of the DecoderPool opens the file
    engine thread   Engine.step, which alone tells the executor what to run

Loop and workers send commands (add, cancel) to the engine thread, which takes them between steps; chunks come
back with `call_soon_threadsafe`. It knows nothing of the wire.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from trimserve.api.adapter import AdapterInfo, LoadedAdapter
from trimserve.api.chunks import Finished, GenerationChunk
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.api.status import EngineStatus, StepListener
from trimserve.config import EngineConfig
from trimserve.engine.adapters import Adapters
from trimserve.engine.engine import Engine
from trimserve.engine.look_again import in_passes
from trimserve.engine.outbox import Outbox, call_on, settle
from trimserve.engine.preparation import why_not_prepared
from trimserve.engine.preparation_workers import PreparationWorkers
from trimserve.engine.processor import Processor
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.engine.status import engine_status
from trimserve.engine.stream import Stream
from trimserve.engine.warm_up import warm_up
from trimserve.engine.watchdog import hang, log_cause
from trimserve.engine.workers import in_daemon_thread, leave_behind
from trimserve.errors import DeadlinePassed, EngineBusy, EngineStopped, TrimserveError
from trimserve.executor.executor import Executor
from trimserve.imaging.pool import DecoderPool

__all__ = ["Runner"]

log = logging.getLogger(__name__)


class Runner:
    """Runs an engine beside an event loop. All methods belong to that loop's thread."""

    def __init__(
        self,
        load: Callable[[], tuple[Processor, Executor]],
        config: EngineConfig,
        decoders: DecoderPool | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            load: called once by `start`, in a thread.
            config: how much to take on. Of its workers, as many tokenise as decode images.
            decoders: decodes the processor's images; started and closed with the engine. None if it does so itself.
            adapters: folders of those that `start` loads, by name.
        """
        self._load = load
        self._adapters_at_start = adapters or {}
        self._adapters = Adapters()
        self._config = config
        self._workers = PreparationWorkers(config.num_preprocess_workers, decoders)
        self._on_step: StepListener | None = None
        self._executor: Executor | None = None
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._refusal: str | None = "the engine has not started"
        """Why no request is taken now; None when they are."""
        self._ready_at: float | None = None
        self._death: asyncio.Future[BaseException]
        self._is_alive, self._is_ending = True, False
        self._streams: set[Stream] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        # Its lock guards what several threads change: the commands, and what a stream has until it is closed.
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._is_leaving = False
        self._loop: asyncio.AbstractEventLoop
        self._outbox: Outbox

    @property
    def info(self) -> ModelInfo:
        """The loaded model.

        Raises:
            EngineStopped: it is not loaded yet.
        """
        return self._loaded.info

    def token_bytes(self, token_ids: Iterable[int]) -> tuple[bytes, ...]:
        """See `detokenizer.token_bytes`."""
        return self._loaded.token_bytes(token_ids)

    def watch_steps(self, listener: StepListener) -> None:
        """Tell a listener of every decode step, on the engine's thread; to be called before `start`."""
        self._on_step = listener

    async def start(self) -> None:
        """Load the model, start the engine thread, warm up with a tiny generation, take requests. Once.

        Raises:
            CheckpointError: `ModelInfo.max_model_len` is too small for any request with an image.
            Exception: what loading or warming up failed with; nothing is left running.
        """
        self._refusal = starting = "the engine is starting"
        self._loop = asyncio.get_running_loop()
        self._death = self._loop.create_future()
        self._outbox = Outbox(self._loop, self._deliver)
        self._workers.start()
        try:
            processor, executor = await in_daemon_thread(self._load, discard=lambda loaded: loaded[1].close())
            self._executor = executor
            if self._refusal != starting:
                raise EngineStopped("the engine was stopped while its model was loaded")
            for name, folder in self._adapters_at_start.items():
                read = partial(in_daemon_thread, partial(executor.load_adapter, name, folder))
                await self._adapters.load(name, read)
            self._engine = Engine(processor, executor, self._config, self._on_step)
            is_warm: asyncio.Future[None] = self._loop.create_future()
            executor.watch(lambda error: call_on(self._loop, partial(self._break, is_warm, error)))
            take_steps = partial(self._run, self._engine, is_warm)
            self._thread = threading.Thread(target=take_steps, name="trimserve-engine", daemon=True)
            self._thread.start()
            self._watcher = asyncio.create_task(self._watch(self._engine, self._thread, is_warm))
            await is_warm
            if self._refusal != starting:
                raise EngineStopped("the engine was stopped while it warmed up")
        except BaseException:
            await self.stop(0.0)
            raise
        self._refusal, self._ready_at = None, time.monotonic()

    async def submit(
        self, request: GenerationRequest, *, deadline: float | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Generate; closing the generator, or cancelling who awaits it, ends the request within one step.

        Args:
            request: what to generate.
            deadline: value of `time.monotonic()` after which nobody wants the answer.
        Yields:
            `Started`, then `TokenDelta`s, and for each answer a `Finished`.
        Raises:
            EngineStopped: not ready, draining or dead.
            UnknownAdapter: the request's adapter is not loaded.
            EngineBusy: the queue is full.
            OutOfMemory: there is no memory for this request now.
            InvalidRequest: what the tokenizer, the images' pixels or the context length refuse.
            DeadlinePassed: the deadline came first.
            RequestFailed: the model failed on this request.
        """
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
        generation = in_passes(self._generate, request, deadline, self.info)
        del request  # a frame that waits for the answer keeps no images
        async with aclosing(generation) as chunks:
            async for chunk in chunks:
                yield chunk

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """What requests may name, and who does."""
        return self._adapters.loaded()

    async def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Load an adapter beside the requests that run; see `Adapters.load` and `Engine.load_adapter`."""
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
        read = partial(self._loaded.load_adapter, name, folder)
        return await self._adapters.load(name, partial(in_daemon_thread, read))

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter once no request has it; see `Adapters.unload`."""
        if self._refusal is not None:
            raise EngineStopped(self._refusal)
        await self._adapters.unload(name, partial(self._forget_adapter, self._loaded, name))

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        status = engine_status(
            self._engine,
            self._streams,
            self._config,
            self._adapters.num_bytes,
            is_ready=self._refusal is None,
            is_alive=self._is_alive,
            uptime_seconds=0.0 if self._ready_at is None else time.monotonic() - self._ready_at,
        )
        return self._workers.complete(status, self._config.step_timeout_seconds)

    async def death(self) -> BaseException:
        """Wait, for ever in the good case, until the engine thread of a started runner dies or hangs; the cause."""
        return await asyncio.shield(self._death)

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, let the accepted ones finish, end what is left with `EngineStopped`.

        Returns when the engine thread has ended, or hangs; the processes that decode images are ended. A second
        call does nothing more.

        Args:
            grace_seconds: how long accepted requests may go on, at least 0.
        """
        self._refusal = "the engine is stopping"
        self._adapters.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), grace_seconds)
        self._is_ending = True
        self._end(tuple(self._streams), lambda: EngineStopped("the engine stopped before the request ended"))
        self._command(self._leave)
        await asyncio.to_thread(self._join)
        if self._watcher is not None:
            self._watcher.cancel()
        self._refusal = "the engine has stopped"

    # ---- event loop ----

    async def _generate(
        self, request: GenerationRequest, deadline: float | None, came_at: float | None
    ) -> AsyncGenerator[GenerationChunk, None]:
        stream, timer = self._open(request, deadline, came_at), None
        num_answers = stream.num_answers
        del request  # see `submit`
        try:
            if deadline is not None:
                timer = self._loop.call_later(deadline - time.monotonic(), self._expire, stream)
            self._workers.text.submit(stream.urgency, partial(self._prepare, stream))
            while num_answers:
                for chunk in await stream.take():
                    if isinstance(chunk, TrimserveError):
                        raise chunk
                    yield chunk
                    num_answers -= isinstance(chunk, Finished)
        finally:
            if timer is not None:
                timer.cancel()
            self._close(stream)

    def _open(self, request: GenerationRequest, deadline: float | None, came_at: float | None = None) -> Stream:
        if self._is_ending:  # a second pass would be a stream that nobody ends
            raise EngineStopped(str(self._refusal))
        num_live = sum(stream.state is not SequenceState.ENDED for stream in self._streams)
        if came_at is None and num_live >= self._config.max_batch + self._config.max_queue:
            queue = f"the queue of {self._config.max_queue} (max_queue) is full"
            raise EngineBusy(f"{num_live} requests run or wait: {queue}")
        stream = Stream.of(request, time.monotonic() if came_at is None else came_at)
        sink, images_taken = partial(self._outbox.put, stream), partial(self._workers.images_taken, stream)
        stream.preparation = self._loaded.preparation(request, sink, stream.submitted_at, deadline, images_taken)
        if request.adapter is not None:
            self._adapters.take(request.adapter, is_held=came_at is not None)
            stream.adapter = request.adapter
        self._streams.add(stream)
        self._is_idle.clear()
        return stream

    def _deliver(self, stream: Stream, item: GenerationChunk | TrimserveError) -> None:
        if stream.is_open:
            stream.chunks.put_nowait(item)
            stream.num_answers -= isinstance(item, Finished)
            if not stream.num_answers or isinstance(item, TrimserveError):
                self._close(stream)

    def _end(self, streams: Collection[Stream], make_error: Callable[[], TrimserveError]) -> None:
        """Say an error after all that the engine has said."""
        for stream in streams:
            self._outbox.put(stream, make_error())
        if streams:
            self._outbox.flush()

    def _close(self, stream: Stream) -> None:
        with self._wake:
            stream.is_open, stream.preparation = False, None
            sequence, stream.sequence = stream.sequence, None
            adapter, stream.adapter = stream.adapter, None
        self._workers.images_taken(stream)
        if sequence is not None and sequence.request_state is not SequenceState.ENDED:
            self._command(partial(self._loaded.cancel, sequence))
        if adapter is not None:
            self._adapters.give_back(adapter)
        self._streams.discard(stream)
        if not self._streams:
            self._is_idle.set()

    async def _forget_adapter(self, engine: Engine, name: str) -> None:
        is_gone: asyncio.Future[None] = self._loop.create_future()

        def forget() -> None:
            """In the engine's thread."""
            engine.unload_adapter(name)
            call_on(self._loop, partial(settle, is_gone, None))

        self._command(forget)  # behind the cancellation of what had it
        either: tuple[asyncio.Future[Any], ...] = is_gone, self._death
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def _expire(self, stream: Stream) -> None:
        doing = "being prepared" if stream.sequence is None else stream.state.value
        self._end([stream], lambda: DeadlinePassed(f"the deadline passed while the request was {doing}"))

    async def _watch(self, engine: Engine, thread: threading.Thread, is_warm: "asyncio.Future[None]") -> None:
        self._break(is_warm, await hang(thread, lambda: engine.step_began_at, self._config.step_timeout_seconds))

    def _break(self, is_warm: "asyncio.Future[None]", error: BaseException) -> None:
        """Die, whatever the engine's thread is doing."""
        if self._thread is not None:
            leave_behind(self._thread)  # it cannot be ended from outside
        self._die(error)
        settle(is_warm, error)

    def _die(self, error: BaseException) -> None:
        if self._death.done():
            return
        self._refusal = died = "the engine died"  # why is the operator's business
        self._death.set_result(error)
        self._is_alive, self._is_ending = False, True
        self._end(tuple(self._streams), lambda: EngineStopped(died))

    def _join(self) -> None:
        while self._is_alive and self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)  # then look whether it hangs
        self._workers.stop()
        if self._executor is not None:
            self._executor.close()

    @property
    def _loaded(self) -> Engine:
        if self._engine is None:
            raise EngineStopped(self._refusal)
        return self._engine

    # ---- worker threads ----

    def _prepare(self, stream: Stream) -> None:
        """One step of a request's preparation."""
        preparation = stream.preparation
        if preparation is None:
            return
        try:
            sequence = preparation.advance()
        except BaseException as error:  # noqa: BLE001  # a panic in compiled code is no Exception
            self._outbox.put(stream, why_not_prepared(error, stream.request_id))
        else:
            self._go_on(stream, sequence)

    def _go_on(self, stream: Stream, sequence: Sequence | None) -> None:
        with self._wake:
            if not stream.is_open:
                return
            if sequence is None:
                self._workers.submit_image(stream, partial(self._prepare, stream))
            else:
                stream.preparation, stream.sequence = None, sequence
                self._command(partial(self._loaded.add, sequence))

    # ---- engine thread ----

    def _run(self, engine: Engine, is_warm: "asyncio.Future[None]") -> None:
        try:
            warm_up(engine)
        except BaseException as error:  # noqa: BLE001  # handed to whoever awaits it
            call_on(self._loop, partial(settle, is_warm, error))
            return
        call_on(self._loop, partial(settle, is_warm, None))
        try:
            while not self._is_leaving:
                for command in self._take_commands(engine):
                    command()
                engine.step()
        except BaseException as error:  # noqa: BLE001  # logged, and told to whoever awaits the engine's death
            log_cause(partial(log.critical, "the engine thread dies", exc_info=error))
            call_on(self._loop, partial(self._die, error))

    def _take_commands(self, engine: Engine) -> list[Callable[[], None]]:
        """Wait until there is something to do."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or engine.has_work)
            commands, self._commands = self._commands, []
            return commands

    def _leave(self) -> None:
        self._is_leaving = True

    # ---- any thread ----

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
