"""A thin Python client: sets the right limits, and makes requests of strings and image files.

Answers are the generated messages themselves, errors are gRPC's own `grpc.RpcError`. `service_config.json`, which
clients in other languages can use unchanged, sets retries, timeouts and load balancing over the addresses of a name.
Programs with an event loop use `make_request` with the generated stubs, and
`channel_options`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack

import grpc

from trimserve.loopback import proxy_options
from trimserve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = [
    "IMAGE_HASH",
    "MAX_MESSAGE_BYTES",
    "SERVICE_CONFIG",
    "ChatInput",
    "Client",
    "ImageSource",
    "RequestOptions",
    "Tls",
    "channel_options",
    "image_hash",
    "make_image",
    "make_request",
]

MAX_MESSAGE_BYTES = 64 * 2**20
"""The servers' default; gRPC's own limit of 4 MiB is too small for images."""

SERVICE_CONFIG = Path(__file__).with_name("service_config.json")
"""Timeouts, retries, load balancing and health checking of clients."""

IMAGE_HASH = "x-image-hash"
"""Metadata by which a proxy can send questions on one image to the server that has it cached."""

ImageSource = bytes | str | Path
"""Content of an image file, or its path."""

ChatInput = str | Sequence[generation_pb2.Message]
"""The user's question, or a whole conversation."""


def channel_options(
    max_message_bytes: int = MAX_MESSAGE_BYTES, *, address: str | None = None
) -> list[tuple[str, int | str]]:
    """What a channel to a server needs: sizes, the service config, pings; and no proxy to this very machine.

    Args:
        max_message_bytes: of one message, either way.
        address: that the channel is made with; None leaves it to the environment whether a proxy is asked.
    """
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),  # a larger request would not be tried again
        ("grpc.service_config", SERVICE_CONFIG.read_text()),
        ("grpc.max_reconnect_backoff_ms", 10_000),  # gRPC's own is two minutes, after which a server is long back
        ("grpc.keepalive_time_ms", 30_000),  # an answer may be long in coming: keeps its connection in NAT tables
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        *(proxy_options(address) if address is not None else ()),
    ]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files that authenticate the server, and us to it."""

    ca: Path | None = None
    """Authorities for the server's certificate; None is gRPC's default roots."""
    certificate: Path | None = None
    """Our certificate chain, for servers that require one."""
    key: Path | None = None
    """The key of `certificate`."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials for a channel.

        Raises:
            OSError: a file cannot be read.
        """
        files = (self.ca, self.key, self.certificate)
        return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))


def make_image(source: ImageSource) -> generation_pb2.Image:
    """An image to send.

    Args:
        source: content, or path, of an image file.
    Raises:
        OSError: the file cannot be read.
    """
    return generation_pb2.Image(data=source if isinstance(source, bytes) else Path(source).read_bytes())


def image_hash(request: generation_pb2.GenerateRequest) -> str | None:
    """The value of `IMAGE_HASH` for a request, 32 hexadecimal digits of its first image; None without images.

    A conversation that is shown others later stays where it is.

    Args:
        request: of any kind of prompt.
    """
    parts = (part for message in request.chat.messages for part in message.parts if part.HasField("image"))
    first = next((part.image for part in parts), request.images[0] if request.images else None)
    return None if first is None else hashlib.sha256(first.data).hexdigest()[:32]


class RequestOptions(TypedDict, total=False):
    """Fields of a request besides its prompt and images; None is the same as leaving one out."""

    system: str | None
    """Text of a system message that goes first."""
    sampling: generation_pb2.SamplingParams | None
    """Unset fields have the checkpoint's defaults."""
    trim: generation_pb2.TrimOptions | None
    """Default: trimming on, with the checkpoint's budget."""
    request_id: str | None
    """Default: drawn by the server."""
    priority: int | None
    """Default: 0."""
    num_choices: int | None
    """Answers to the prompt. Default: 1."""
    adapter: str | None
    """Default: the base model."""
    json_schema: str | Mapping[str, Any] | None
    """The answer is JSON that is valid against this schema. At most one of this and the next four."""
    json_object: bool | None
    """The answer is a JSON object."""
    regex: str | None
    """The answer is what this matches from end to end."""
    choice: Sequence[str] | None
    """The answer is one of these."""
    grammar: str | None
    """The answer is a sentence of this grammar, in llguidance's dialect of Lark."""


def make_request(
    prompt: ChatInput, images: Sequence[ImageSource] = (), **options: Unpack[RequestOptions]
) -> generation_pb2.GenerateRequest:
    """A chat request.

    Args:
        prompt: the user's question, or whole messages, which contain their images.
        images: placed before a `prompt` that is a string.
        **options: see `RequestOptions`.
    Raises:
        OSError: an image file cannot be read.
        ValueError: both `images` and whole messages are given, or two constraints.
    """
    if isinstance(prompt, str):
        shown = [generation_pb2.Part(image=make_image(image)) for image in images]
        messages = [_message(generation_pb2.ROLE_USER, *shown, generation_pb2.Part(text=prompt))]
    elif images:
        raise ValueError("images: must be parts of the messages, got some beside them")
    else:
        messages = list(prompt)
    system = options.get("system")
    if system is not None:
        messages.insert(0, _message(generation_pb2.ROLE_SYSTEM, generation_pb2.Part(text=system)))
    request = generation_pb2.GenerateRequest(
        request_id=options.get("request_id"),
        chat=generation_pb2.Chat(messages=messages),
        sampling=options.get("sampling"),
        trim=options.get("trim"),
        priority=options.get("priority"),
        num_choices=options.get("num_choices"),
        adapter=options.get("adapter"),
    )
    _constrain(request, options)
    return request


class Client:
    """A connection to one server; thread-safe, and a context manager."""

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Connect on first use.

        Args:
            address: `HOST:PORT`; calls are spread over all addresses of a name. The environment's proxy
                (`http_proxy`) is used, except for this machine.
            tls: None is plaintext.
            token: sent with every call; over plaintext, eavesdroppers can read it.
            max_message_bytes: of one message, in either direction.
        Raises:
            OSError: a file of `tls` cannot be read.
        """
        options = channel_options(max_message_bytes, address=address)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options)
        self._metadata: tuple[tuple[str, str], ...] = () if token is None else (("authorization", f"Bearer {token}"),)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; open calls are cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: ChatInput | generation_pb2.GenerateRequest,
        images: Sequence[ImageSource] = (),
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> generation_pb2.GenerateResponse:
        """The whole answer at once.

        Args:
            prompt: as `make_request` takes it, or a whole request, without other arguments.
            images: as `make_request` takes them.
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
            **options: see `RequestOptions`.
        Raises:
            grpc.RpcError: any status but OK.
            OSError: an image file cannot be read.
        """
        request = _request(prompt, images, options)
        return self._generation.Generate(request, timeout=timeout_seconds, metadata=self._metadata_of(request))

    def stream(
        self,
        prompt: ChatInput | generation_pb2.GenerateRequest,
        images: Sequence[ImageSource] = (),
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[generation_pb2.GenerateStreamResponse]:
        """The answer as it is generated; closing the iterator cancels the request.

        Args:
            prompt: as `make_request` takes it, or a whole request, without other arguments.
            images: as `make_request` takes them.
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
            **options: see `RequestOptions`.
        Raises:
            grpc.RpcError: any status but OK, also after some messages.
            OSError: an image file cannot be read.
        """
        request = _request(prompt, images, options)
        metadata = self._metadata_of(request)
        call = self._generation.GenerateStream(request, timeout=timeout_seconds, metadata=metadata)
        try:
            yield from call
        finally:
            call.cancel()

    def _metadata_of(self, request: generation_pb2.GenerateRequest) -> tuple[tuple[str, str], ...]:
        digest = image_hash(request)
        return self._metadata if digest is None else (*self._metadata, (IMAGE_HASH, digest))

    def model(self, *, timeout_seconds: float | None = None) -> model_pb2.GetModelResponse:
        """The served model.

        Args:
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
        Raises:
            grpc.RpcError: any status but OK.
        """
        return self._model.GetModel(model_pb2.GetModelRequest(), timeout=timeout_seconds, metadata=self._metadata)

    def status(self, *, timeout_seconds: float | None = None) -> model_pb2.GetServerStatusResponse:
        """The server's load and memory now.

        Args:
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
        Raises:
            grpc.RpcError: any status but OK.
        """
        request = model_pb2.GetServerStatusRequest()
        return self._model.GetServerStatus(request, timeout=timeout_seconds, metadata=self._metadata)

    def load_adapter(
        self, name: str, folder: str | Path, *, timeout_seconds: float | None = None
    ) -> adapter_pb2.Adapter:
        """Load a LoRA adapter, which requests may name from then on.

        Args:
            name: what requests will call it.
            folder: on the server's machine.
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
        Raises:
            grpc.RpcError: any status but OK.
        """
        request = adapter_pb2.LoadAdapterRequest(name=name, folder=str(folder))
        return self._adapters.LoadAdapter(request, timeout=timeout_seconds, metadata=self._metadata).adapter

    def unload_adapter(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """Refuse new requests for an adapter, wait for those that have it, and let the server forget it.

        Args:
            name: what requests call it.
            timeout_seconds: deadline of the call, not of the unloading; None is that of `service_config.json`.
        Raises:
            grpc.RpcError: any status but OK.
        """
        request = adapter_pb2.UnloadAdapterRequest(name=name)
        self._adapters.UnloadAdapter(request, timeout=timeout_seconds, metadata=self._metadata)

    def adapters(self, *, timeout_seconds: float | None = None) -> list[adapter_pb2.Adapter]:
        """The adapters that requests may name.

        Args:
            timeout_seconds: deadline of the call; None is that of `service_config.json`.
        Raises:
            grpc.RpcError: any status but OK.
        """
        request = adapter_pb2.ListAdaptersRequest()
        return [*self._adapters.ListAdapters(request, timeout=timeout_seconds, metadata=self._metadata).adapters]


def _request(
    prompt: ChatInput | generation_pb2.GenerateRequest, images: Sequence[ImageSource], options: RequestOptions
) -> generation_pb2.GenerateRequest:
    if not isinstance(prompt, generation_pb2.GenerateRequest):
        return make_request(prompt, images, **options)
    if images or options:
        raise ValueError("images and options: must be part of the request, got some beside it")
    return prompt


def _constrain(request: generation_pb2.GenerateRequest, options: RequestOptions) -> None:
    schema, choice = options.get("json_schema"), options.get("choice")
    constraints = {
        "json_schema": json.dumps(dict(schema)) if isinstance(schema, Mapping) else schema,
        "json_object": generation_pb2.JsonObject() if options.get("json_object") else None,
        "regex": options.get("regex"),
        "choice": None if choice is None else generation_pb2.ChoiceConstraint(options=choice),
        "grammar": options.get("grammar"),
    }
    given = {name: value for name, value in constraints.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: an answer can have one constraint only")
    request.MergeFrom(generation_pb2.GenerateRequest(**given))  # type: ignore[arg-type]  # each name has its own type


def _message(role: generation_pb2.Role, *parts: generation_pb2.Part) -> generation_pb2.Message:
    return generation_pb2.Message(role=role, parts=parts)
