"""Clients that never rest: each sends its next request when the last one has ended, and checks how it ended."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from scripts.verify.load.asks import Ask, Asks, Fate
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

__all__ = ["Tally", "fault_of_stream", "full_load"]

_MAX_FAULTS = 20
"""Of which the text is kept; all are counted."""


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    """By fate, as it came."""
    answered: Counter[str] = field(default_factory=Counter)
    """By kind of request."""
    num_tokens: int = 0
    """Of answers that came whole."""
    num_faults: int = 0
    """Requests that ended in a way that nobody provoked."""
    faults: list[str] = field(default_factory=list)
    """The first of them."""

    def add(self, ask: Ask, outcome: Fate | str) -> None:
        """Note how a request ended: by a fate, or why it should not have."""
        if isinstance(outcome, str):
            self.num_faults += 1
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(f"{ask.kind}: {outcome}")
            return
        self.ended[outcome.value] += 1
        if outcome is Fate.ANSWERED:
            self.answered[ask.kind] += 1
            self.num_tokens += ask.request.sampling.max_new_tokens


async def full_load(channel: grpc.aio.Channel, asks: Asks, *, num_clients: int, seconds: float) -> Tally:
    """Keep a server busy.

    Args:
        channel: to the server.
        asks: drawn one by one, by all clients together.
        num_clients: that have a request each, always.
        seconds: after which they send no more; what was sent is waited for.
    """
    tally, end = Tally(), time.monotonic() + seconds
    stub = generation_pb2_grpc.GenerationServiceStub(channel)

    async def client() -> None:
        while time.monotonic() < end:
            ask = asks.draw()
            tally.add(ask, await _perform(stub, ask))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return tally


def fault_of_stream(events: Sequence[pb.GenerateStreamResponse], num_tokens: int) -> str | None:
    """What is wrong with a whole stream; None: nothing.

    Args:
        events: all that came.
        num_tokens: that were to come.
    """
    kinds = [event.WhichOneof("event") for event in events]
    if kinds[:1] != ["started"] or kinds[-1:] != ["finished"] or set(kinds[1:-1]) - {"delta"}:
        return f"the stream is no start, tokens and end, but {kinds[:3]} ... {kinds[-3:]}"
    told = events[-1].finished.usage.num_generated_tokens
    came = sum(len(event.delta.token_ids) for event in events)
    if (told, came) != (num_tokens, num_tokens):
        return f"{num_tokens} tokens were to come, {came} came, and the end says {told}"
    return None


async def _perform(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", ask: Ask) -> Fate | str:
    try:
        return await (_stream(stub, ask) if ask.is_streamed else _unary(stub, ask))
    except grpc.aio.AioRpcError as error:
        if ask.fate is Fate.REFUSED and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return Fate.REFUSED
        return f"{error.code().name}: {error.details()}"


async def _stream(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", ask: Ask) -> Fate | str:
    call = stub.GenerateStream(ask.request)
    events: list[pb.GenerateStreamResponse] = []
    is_cancelled = ask.fate is Fate.CANCELLED
    while not is_cancelled or len(events) < ask.num_messages:
        event = await call.read()
        if not isinstance(event, pb.GenerateStreamResponse):  # the end
            return fault_of_stream(events, ask.request.sampling.max_new_tokens) or _answered(ask)
        events.append(event)
    return await _cancel(call)


async def _unary(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", ask: Ask) -> Fate | str:
    call = stub.Generate(ask.request)
    if ask.fate is Fate.CANCELLED:
        await asyncio.sleep(ask.wait_seconds)
        return await _cancel(call)
    answer = await call
    wanted, told = ask.request.sampling.max_new_tokens, answer.usage.num_generated_tokens
    if (told, len(answer.token_ids)) != (wanted, wanted):
        return f"{wanted} tokens were to come, {len(answer.token_ids)} came, and the answer says {told}"
    return _answered(ask)


async def _cancel(call: grpc.aio.Call) -> Fate | str:
    """Leave a call, which may have ended before."""
    call.cancel()
    match await call.code():
        case grpc.StatusCode.CANCELLED:
            return Fate.CANCELLED
        case grpc.StatusCode.OK:
            return Fate.ANSWERED
        case code:
            return f"{code.name}: {await call.details()}"


def _answered(ask: Ask) -> Fate | str:
    return "was answered" if ask.fate is Fate.REFUSED else Fate.ANSWERED
