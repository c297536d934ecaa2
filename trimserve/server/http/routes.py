"""The routes. Errors are raised; `exchange.py` turns them into answers."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from trimserve.api.chunks import GenerationChunk
from trimserve.errors import InvalidRequest, UnknownAdapter, UnknownMethod
from trimserve.server.admission import Admission
from trimserve.server.core import Core
from trimserve.server.deadline import Deadline
from trimserve.server.grpc.codec import SMALL_BYTES
from trimserve.server.http.answers import AnswerWriter
from trimserve.server.http.convert import convert, openai_error
from trimserve.server.http.exchange import DONE, Exchange, event
from trimserve.server.http.inbox import Inbox
from trimserve.server.http.schema import ChatRequest, parse
from trimserve.server.observer import RequestObserver
from trimserve.server.offload import LARGE_BYTES
from trimserve.server.target import path_of
from trimserve.v1 import generation_pb2, model_pb2

__all__ = ["Routes"]

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
"""The services that the token file grants: a route is for the clients of the service that does the same."""

T = TypeVar("T")

Handler = Callable[[Exchange, Scope], Awaitable[None]]


class Routes:
    """What the server answers."""

    def __init__(self, core: Core, inbox: Inbox) -> None:
        """Serve an engine.

        Args:
            core: until its engine is started, requests are refused with EngineStopped.
            inbox: reads bodies.
        """
        self.is_serving = False
        """What `/health` says."""
        self._core = core
        self._inbox = inbox
        self._born = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        unknown = self._endpoint("other", self._unknown)
        router = Router(
            routes=[
                self._route("POST", "/v1/chat/completions", self._chat),
                self._route("GET", "/v1/models", self._models),
                self._route("GET", "/v1/models/{model:path}", self._model),
                self._route("GET", "/health", self._health),
                Route("/{path:path}", unknown),  # of other methods, too
            ],
            default=unknown,  # where a path has a line end
        )

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await router({**scope, "path": path_of(scope["path"])}, receive, send)

        return app

    def _route(self, method: str, path: str, handler: Handler) -> Route:
        return Route(path, self._endpoint(path, handler), methods=[method])

    def _endpoint(self, name: str, handler: Handler) -> Any:
        return _Endpoint(self._core, name, handler)

    async def _health(self, exchange: Exchange, _scope: Scope) -> None:
        """Open to all, because probes cannot send a token."""
        status = HTTPStatus.OK if self.is_serving else HTTPStatus.SERVICE_UNAVAILABLE
        await exchange.answer({"status": "serving" if self.is_serving else "not serving"}, status)

    async def _models(self, exchange: Exchange, _scope: Scope) -> None:
        """The model, and adapters under their names."""
        with self._core.gate.admit(MODEL, exchange.headers, exchange.peer) as admission:
            exchange.client = admission.client
            await exchange.answer({"object": "list", "data": [self._described(name) for name in self._names()]})

    async def _model(self, exchange: Exchange, scope: Scope) -> None:
        """One of them."""
        with self._core.gate.admit(MODEL, exchange.headers, exchange.peer) as admission:
            exchange.client = admission.client
            name = scope["path_params"]["model"]
            if name not in self._names():
                raise UnknownAdapter(f"model: must be one of {', '.join(self._names())}, got {name[:64]!r}")
            await exchange.answer(self._described(name))

    def _names(self) -> list[str]:
        return [self._core.backend.info.model_id, *(each.info.name for each in self._core.backend.adapters())]

    def _described(self, name: str) -> dict[str, Any]:
        length = self._core.backend.info.max_model_len
        return {"id": name, "object": "model", "created": self._born, "owned_by": "trimserve", "max_model_len": length}

    async def _unknown(self, exchange: Exchange, scope: Scope) -> None:
        """Only clients are told what there is not."""
        exchange.client = self._core.gate.identify(exchange.headers, exchange.peer).name
        raise UnknownMethod(f"there is no {scope['method'][:16]} {scope['path'][:128]}")

    async def _chat(self, exchange: Exchange, _scope: Scope) -> None:
        arrived = time.monotonic()
        try:
            with self._core.gate.admit(GENERATION, exchange.headers, exchange.peer) as admission:
                exchange.client = admission.client
                body = await self._inbox.read(exchange.receive, exchange.headers, admission)
                exchange.received(len(body))
                async with exchange.until_client_leaves():
                    request = await self._off_loop(len(body), partial(parse, body))
                    del body
                    exchange.accepted()
                    writer = AnswerWriter(
                        request, exchange.request_id, self._core.backend.info, self._core.backend.token_bytes
                    )
                    is_streamed, has_logprobs = bool(request.stream), bool(request.logprobs)
                    chunks = self._chunks(request, exchange.request_id, admission, arrived)
                    del request  # see `_chunks`
                    async with aclosing(chunks):
                        if is_streamed:
                            await _stream(exchange, writer, chunks)
                        else:
                            whole = partial(writer.whole, [chunk async for chunk in chunks])
                            content = await self._off_loop(LARGE_BYTES if has_logprobs else 0, whole)
                            await exchange.answer(content)
        finally:
            if exchange.request_bytes >= LARGE_BYTES:
                self._core.offload.trim_soon()

    async def _chunks(
        self, request: ChatRequest, request_id: str, admission: Admission, arrived: float
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The request's answer; no frame keeps the request, so that its images are free once the engine has them."""
        core = self._core
        deadline = _deadline(request, arrived)
        observer = RequestObserver(core.metrics, "GenerateStream" if request.stream else "Generate")
        try:
            info = core.backend.info
            adapters = [each.info.name for each in core.backend.adapters()]
            work = partial(convert, request, request_id, adapters, info, core.config.engine)
            del request
            generation = await self._off_loop(admission.held_bytes, work)
            del work
            admission.check_priority(generation.priority)
            observer.accepted(generation)
            chunks = core.backend.submit(generation, deadline=deadline.bounded(core.config.server))
            del generation
            # Closing the generator is what cancels a request whose client has gone.
            async with aclosing(chunks):
                async for chunk in chunks:
                    observer.saw(chunk)
                    admission.saw(chunk)
                    yield chunk
        except BaseException as error:
            observer.failed(error, is_past_deadline=deadline.has_passed())
            if isinstance(error, InvalidRequest):
                raise openai_error(error) from None
            raise

    async def _off_loop(self, num_bytes: int, work: Callable[[], T]) -> T:
        """The result of work on so many bytes, which would hold up the event loop if they are many."""
        return work() if num_bytes <= SMALL_BYTES else await self._core.offload.run(work)


async def _stream(exchange: Exchange, writer: AnswerWriter, chunks: AsyncIterator[GenerationChunk]) -> None:
    """Send the answer as events; the status waits for the first chunk, so that refusals have theirs."""
    has_begun = False
    async for chunk in chunks:
        if not has_begun:
            await exchange.begin_stream()
            has_begun = True
        if events := b"".join(map(event, writer.chunks(chunk))):
            await exchange.say(events)
    await exchange.say(DONE, more_body=False)


def _deadline(request: ChatRequest, arrived: float) -> Deadline:
    seconds = None if request.trimserve is None else request.trimserve.timeout_seconds
    return Deadline(None if seconds is None else seconds - (time.monotonic() - arrived))


class _Endpoint:
    """A handler as an ASGI application, around which an `Exchange` stands."""

    def __init__(self, core: Core, name: str, handler: Handler) -> None:
        self._core = core
        self._name = name
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._core, self._name, scope, receive, send)
        async with exchange.answered():
            await self._handler(exchange, scope)
