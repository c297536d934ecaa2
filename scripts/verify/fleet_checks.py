"""What every front of a fleet must let through, asked by way of it and directly: `envoy.py` and `ray_serve.py`.

Clients here try nothing again by themselves, so that what is seen is the front's doing.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from trimserve.client import IMAGE_HASH, channel_options, image_hash, make_request
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc as pb_grpc

__all__ = [
    "PATIENCE_SECONDS",
    "Caller",
    "calling",
    "cancel_many",
    "deadlines",
    "images_stay_where_they_are",
    "processor_seconds",
    "request",
    "same_refusals",
    "until",
]

PATIENCE_SECONDS = 60.0
"""For what must happen soon, on a busy machine."""

NUM_CANCELS = 72
NUM_IMAGES = 6

DEADLINE = 0.15
"""Seconds, of answers that take longer."""


class Caller:
    """Calls of one address."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        """Ask nothing yet.

        Args:
            channel: to the front or to a server.
            metadata: of every call.
        """
        self._stub = pb_grpc.GenerationServiceStub(channel)
        self._metadata = tuple(metadata)

    def _told(self, request: pb.GenerateRequest) -> tuple[tuple[str, str], ...]:
        digest = image_hash(request)
        return self._metadata if digest is None else (*self._metadata, (IMAGE_HASH, digest))

    def whole(self, request: pb.GenerateRequest, seconds: float = PATIENCE_SECONDS) -> Any:
        """A call of `Generate`, with its deadline."""
        return self._stub.Generate(request, timeout=seconds, metadata=self._told(request))

    def stream(self, request: pb.GenerateRequest, seconds: float = 4 * PATIENCE_SECONDS) -> Any:
        """A call of `GenerateStream`, with its deadline."""
        return self._stub.GenerateStream(request, timeout=seconds, metadata=self._told(request))

    async def text(self, request: pb.GenerateRequest, seconds: float = 4 * PATIENCE_SECONDS) -> str:
        """The text of a stream that must come whole."""
        events = [event async for event in self.stream(request, seconds)]
        assert events[-1].HasField("finished"), events[-1]
        return "".join(event.delta.text for event in events)


@asynccontextmanager
async def calling(address: str, metadata: Sequence[tuple[str, str]] = ()) -> AsyncIterator[Caller]:
    """A caller whose channel tries nothing again."""
    options = [*channel_options(address=address), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        yield Caller(channel, metadata)


def request(prompt: str = "Count.", tokens: int = 200, images: Sequence[bytes] = ()) -> pb.GenerateRequest:
    """A greedy answer of always as many tokens."""
    sampling = pb.SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=0)
    return make_request(prompt, images, sampling=sampling)


def _picture(number: int) -> bytes:
    """An image file of its own for each number."""
    buffer = BytesIO()
    Image.new("RGB", (56, 56), (40 * number % 256, 90, 20 * number % 256)).save(buffer, "PNG")
    return buffer.getvalue()


async def _refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Code, message and our trailers of a call that is refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        details = {key: value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"}
        return error.code(), error.details() or "", details
    raise AssertionError("expected a refusal, got an answer")


async def same_refusals(front: Caller, direct: Caller) -> None:
    """Refused calls of every kind, which end by way of the front as they do directly, details included.

    Raises:
        AssertionError: they do not.
    """
    too_hot, no_image = request(), request(images=[b"none"])
    too_hot.sampling.temperature = 1000
    too_long = request(tokens=10**6)
    for wrong in too_hot, no_image, too_long:
        wrong.request_id = "same"
        expected = await _refusal(direct.whole(wrong))
        assert expected[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert expected[2]
        for call in direct.text(wrong), front.whole(wrong), front.text(wrong):
            found = await _refusal(call)
            assert found == expected, (found, expected)


async def deadlines(front: Caller, tokens: int) -> None:
    """A whole answer and a stream that take too long end at their deadline.

    Raises:
        AssertionError: with another status.
    """
    for call in front.whole(request(tokens=tokens), DEADLINE), front.text(request(tokens=tokens), DEADLINE):
        code, *_ = await _refusal(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED, code


async def images_stay_where_they_are(front: Caller, count_hits: Callable[[], float]) -> str:
    """Two questions on each of some images: each is encoded once.

    Args:
        front: before several servers.
        count_hits: how often any of them has found an image in its cache.
    Returns:
        What holds.
    Raises:
        AssertionError: an image was encoded twice.
    """
    before = count_hits()
    for number in range(NUM_IMAGES):
        for question in "What is this?", "Which colour?":
            await front.whole(request(question, 4, [_picture(number)]))
    hits = count_hits() - before
    assert hits == NUM_IMAGES, f"{hits:g} of {NUM_IMAGES} second questions found their image cached"
    return f"{NUM_IMAGES} of {NUM_IMAGES} images were encoded once"


async def cancel_many(front: Caller, tokens: int) -> None:
    """Cancel streams: a third at once, a third after the first message, a third after some."""

    async def leave(number: int) -> None:
        call = front.stream(request(tokens=tokens))
        for _ in range((0, 1, 5)[number % 3]):
            await call.read()
        call.cancel()

    await asyncio.gather(*(leave(number) for number in range(NUM_CANCELS)))


async def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something that takes a while.

    Raises:
        AssertionError: it takes longer than `PATIENCE_SECONDS`.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < end, f"not within {PATIENCE_SECONDS:g} s: {what}"
        await asyncio.sleep(0.1)


def processor_seconds(pid: int) -> float:
    """Processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
