"""A runner without a model: plays a script of chunks, errors and pauses, and remembers what it was asked."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path

from pydantic import ByteSize

from tests.model_info import SMALL
from trimserve.api.adapter import AdapterInfo, LoadedAdapter
from trimserve.api.chunks import (
    CrossKvBytes,
    Finished,
    FinishReason,
    GenerationChunk,
    ImageSelection,
    ImageUsage,
    StageSpan,
    Started,
    Timings,
    TokenDelta,
    TokenLogprob,
)
from trimserve.api.info import GenerationDefaults, ModelInfo
from trimserve.api.prompt import Region
from trimserve.api.request import GenerationRequest
from trimserve.api.status import EngineStatus, StepListener
from trimserve.config import Config, EngineConfig, ServerConfig
from trimserve.errors import DeadlinePassed, EngineStopped
from trimserve.server.grpc.convert import to_generation_request
from trimserve.trimming.policies.table import POLICIES
from trimserve.v1 import generation_pb2 as pb

DEFAULTS = GenerationDefaults(
    temperature=0.6,
    top_p=0.9,
    top_k=50,
    min_p=0.05,
    repetition_penalty=1.1,
    max_new_tokens=32,
    eos_token_ids=(7, 8),
)

INFO = replace(
    SMALL,
    revision="cafe",
    num_parameters=123,
    weight_bytes=492,
    linear_bytes=492,
    step_weight_bytes=492,
    vocab_size=1000,
    image_token_id=1000,
    max_model_len=128,
    max_images=3,
    num_self_attention_layers=6,
    num_cross_attention_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    intermediate_size=192,
    kv_bytes_per_position=256,
    default_merge_ratio=0.25,
    policy_details=tuple(policy.describe() for policy in POLICIES.values()),
    generation_defaults=DEFAULTS,
)

CONFIG = Config(
    engine=EngineConfig(max_image_bytes=ByteSize(1000), max_image_pixels=5000),
    server=ServerConfig(port=0, metrics_port=0),
)

SELECTION = ImageSelection(
    tiles_high=1,
    tiles_wide=2,
    features_per_tile=5,
    content_height=28,
    content_width=50,
    kept=b"\x0f\x00",
    picks_by_head=(b"\x03\x00", b"\x0c\x00"),
)

STARTED = Started(
    request_id="fake",
    num_prompt_tokens=20,
    images=(ImageUsage(padding_features=10, valid_features=10, kept_features=4, merged_features=1),),
    seed=2**64 - 1,
    selections=(SELECTION,),
    looked_at=Region(0.25, 0.0, 0.5, 0.75),
    spans=(StageSpan("queue", 1.0, 1.001), StageSpan("prefill", 1.004, 1.008)),
)

DELTAS = (
    TokenDelta("Hel", (5,), (TokenLogprob(-0.5, ((5, -0.5), (6, -1.5))),)),
    TokenDelta("lo ☃", (6, 9), (TokenLogprob(-0.25, ()), TokenLogprob(-0.75, ()))),
    TokenDelta("!", ()),
)

FINISHED = Finished(
    reason=FinishReason.STOP,
    matched_stop="\n",
    num_prompt_tokens=20,
    num_generated_tokens=3,
    cross_kv=CrossKvBytes(
        untrimmed=8192, held=2048, saved_by_padding=4096, saved_by_trimming=5120, saved_by_visibility=1024
    ),
    timings=Timings(
        queue_seconds=0.001,
        preprocess_seconds=0.002,
        vision_seconds=0.003,
        prefill_seconds=0.004,
        decode_seconds=0.005,
        time_to_first_token_seconds=0.011,
        total_seconds=0.015,
        image_decode_seconds=0.0015,
        trim_select_seconds=0.0025,
        trim_gather_seconds=0.0005,
        detokenize_seconds=0.0001,
    ),
)

CHUNKS: tuple[GenerationChunk, ...] = (STARTED, *DELTAS, FINISHED)


class Pause(Enum):
    """A moment in a script."""

    UNTIL_RELEASED = auto()
    DEATH = auto()
    """The engine dies, and the request ends with it."""


ScriptItem = GenerationChunk | Exception | Pause
Script = Iterable[ScriptItem]


class FakeRunner:
    """Plays `script` for every request."""

    def __init__(self, script: Script = CHUNKS, *, start_error: Exception | None = None) -> None:
        """Remember the script; `start` raises `start_error` when there is one."""
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.deadlines: list[float | None] = []
        self.num_running = 0
        self.is_ready = False
        self.is_alive = True
        self.step_listeners: list[StepListener] = []
        self.start_gate: asyncio.Event | None = None
        """When set, `start` waits for it."""
        self.paused = asyncio.Event()
        """Set once a request has come to a pause."""
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.killed = asyncio.Event()
        """Set when the engine dies."""
        self.stop_graces: list[float] = []
        self.loaded: dict[str, LoadedAdapter] = {}
        """Adapters, by name."""
        self.adapter_error: Exception | None = None
        """What loading or unloading an adapter fails with."""
        self._start_error = start_error
        self._is_loaded = False
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> ModelInfo:
        if not self._is_loaded:
            raise EngineStopped("the fake has not started")
        return INFO

    def token_bytes(self, token_ids: Iterable[int]) -> tuple[bytes, ...]:
        return tuple(f"<{token_id}>".encode() for token_id in token_ids)

    def watch_steps(self, listener: StepListener) -> None:
        self.step_listeners.append(listener)

    async def start(self) -> None:
        if self.start_gate is not None:
            await self.start_gate.wait()
        if self._start_error is not None:
            raise self._start_error
        self._is_loaded = self.is_ready = True

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        return tuple(self.loaded.values())

    async def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        if self.adapter_error is not None:
            raise self.adapter_error
        info = AdapterInfo(name, str(folder), 333, 8, ("lm_head",), changes_image_features=True)
        self.loaded[name] = LoadedAdapter(info, num_requests=2, is_unloading=False)
        return info

    async def unload_adapter(self, name: str) -> None:
        if self.adapter_error is not None:
            raise self.adapter_error
        del self.loaded[name]

    async def submit(
        self, request: GenerationRequest, *, deadline: float | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        if not self.is_ready:
            raise EngineStopped("the fake takes no requests now")
        self.requests.append(request)
        self.deadlines.append(deadline)
        self.num_running += 1
        self._idle.clear()
        try:
            for item in self.script:
                match item:
                    case Pause.UNTIL_RELEASED:
                        await self._pause(deadline)
                    case Pause.DEATH:
                        self.killed.set()
                        raise EngineStopped("the fake died")
                    case Exception():
                        raise item
                    case _:
                        yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1
            if not self.num_running:
                self._idle.set()

    async def _pause(self, deadline: float | None) -> None:
        self.paused.set()
        events = [asyncio.ensure_future(event.wait()) for event in (self.released, self._stopped)]
        timeout = None if deadline is None else deadline - time.monotonic()
        try:
            done, _ = await asyncio.wait(events, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()
        if not done:
            raise DeadlinePassed("the fake was too slow")
        if self._stopped.is_set():
            raise EngineStopped("the fake was stopped")

    def status(self) -> EngineStatus:
        return EngineStatus(
            is_ready=self.is_ready,
            is_alive=self.is_alive,
            num_running=self.num_running,
            num_waiting=2,
            max_batch=16,
            max_queue=64,
            self_kv_bytes=1111,
            cross_kv_bytes=2222,
            cross_kv_untrimmed_bytes=3333,
            kv_capacity_bytes=9999,
            num_preemptions=22,
            num_recomputed_tokens=11,
            num_prefill_passes=33,
            num_proposed_tokens=99,
            num_accepted_tokens=88,
            pixel_bytes=12345,
            image_cache_capacity_bytes=8888,
            image_cache_bytes=777,
            image_cache_kv_bytes=333,
            image_cache_hits=66,
            image_cache_kv_hits=33,
            image_cache_misses=55,
            image_cache_evictions=44,
            adapter_bytes=222,
            uptime_seconds=4.5,
            memory_bytes={"weights": 492, "adapters": 222, "kv": 9999, "free": 123456},
            decoder_deaths={"processor_time": 33, "wall_clock": 2, "crash": 1},
        )

    async def death(self) -> BaseException:
        await self.killed.wait()
        self.is_ready = False
        return ZeroDivisionError("the fake was killed")

    async def stop(self, grace_seconds: float) -> None:
        self.is_ready = False
        self.stop_graces.append(grace_seconds)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        self._stopped.set()


def chat_request(text: str = "Hello") -> pb.GenerateRequest:
    """The simplest valid request."""
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])
    return pb.GenerateRequest(chat=pb.Chat(messages=[message]))


def converted(request: pb.GenerateRequest) -> GenerationRequest:
    """A request as the fake runner gets it."""
    return to_generation_request(request, INFO, CONFIG.engine)
