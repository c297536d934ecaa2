"""From the api's chunks to protobuf messages; the unary response is a fold over the messages of a stream."""

from collections import defaultdict
from collections.abc import AsyncIterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from trimserve import __version__
from trimserve.api.adapter import LoadedAdapter
from trimserve.api.chunks import Finished, FinishReason, GenerationChunk, ImageUsage, Started, TokenDelta, TokenLogprob
from trimserve.api.info import ModelInfo, PolicyInfo
from trimserve.api.status import EngineStatus
from trimserve.config import EngineConfig
from trimserve.v1 import adapter_pb2, generation_pb2, model_pb2

__all__ = ["EventWriter", "adapter", "fold", "model_response", "status_response"]

FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

M = TypeVar("M", bound=Message)


class EventWriter:
    """Turns the chunks of one request into stream messages."""

    def __init__(self, info: ModelInfo) -> None:
        """Begin a stream.

        Args:
            info: names the model in the first message.
        """
        self._info = info
        self._images: tuple[ImageUsage, ...] = ()

    def event(self, chunk: GenerationChunk) -> generation_pb2.GenerateStreamResponse:
        """The message of the next chunk."""
        match chunk:
            case Started():
                self._images = chunk.images
                return generation_pb2.GenerateStreamResponse(started=self._started(chunk))
            case TokenDelta():
                return generation_pb2.GenerateStreamResponse(delta=_delta(chunk))
            case Finished():
                return generation_pb2.GenerateStreamResponse(finished=self._finished(chunk))

    def _started(self, chunk: Started) -> generation_pb2.Started:
        return _mirror(
            generation_pb2.Started,
            chunk,
            model_id=self._info.model_id,
            model_revision=self._info.revision,
            images=[_mirror(generation_pb2.ImageUsage, usage) for usage in chunk.images],
            selections=[_mirror(generation_pb2.ImageSelection, selection) for selection in chunk.selections],
            looked_at=None if chunk.looked_at is None else _mirror(generation_pb2.Region, chunk.looked_at),
        )

    def _finished(self, chunk: Finished) -> generation_pb2.Finished:
        usage = _mirror(
            generation_pb2.Usage,
            chunk,
            images=[_mirror(generation_pb2.ImageUsage, usage) for usage in self._images],
        )
        finished = generation_pb2.Finished(
            finish_reason=FINISH_REASONS[chunk.reason],
            usage=usage,
            cross_kv_bytes=_mirror(generation_pb2.CrossKvBytes, chunk.cross_kv),
            timings=_mirror(generation_pb2.Timings, chunk.timings),
            choice=chunk.choice,
        )
        match chunk.matched_stop:
            case str(stop):
                finished.matched_stop_string = stop
            case int(token_id):
                finished.matched_stop_token_id = token_id
        return finished


async def fold(
    events: AsyncIterable[generation_pb2.GenerateStreamResponse],
) -> generation_pb2.GenerateResponse:
    """Fold the messages of a stream into one response.

    Args:
        events: one `started`, any number of `delta`s, one `finished` for each choice.
    """
    response = generation_pb2.GenerateResponse()
    choices: defaultdict[int, generation_pb2.Choice] = defaultdict(generation_pb2.Choice)
    texts: defaultdict[int, list[str]] = defaultdict(list)
    async for event in events:
        match event.WhichOneof("event"):
            case "started":
                _add_started(response, event.started)
            case "delta":
                choice = choices[event.delta.choice]
                texts[event.delta.choice].append(event.delta.text)
                choice.token_ids.extend(event.delta.token_ids)
                choice.logprobs.extend(event.delta.logprobs)
            case "finished":
                number = event.finished.choice
                choices[number].text = "".join(texts[number])
                _add_finished(choices[number], event.finished)
    for field, value in choices[0].ListFields():  # of the same names in both messages
        response.MergeFrom(generation_pb2.GenerateResponse(**{field.name: value}))
    if len(choices) > 1:
        response.choices.extend(choices[number] for number in sorted(choices))
    return response


def model_response(info: ModelInfo, config: EngineConfig) -> model_pb2.GetModelResponse:
    """The answer of `GetModel`.

    Args:
        info: the served model.
        config: limits on images that are not the model's.
    """
    return _mirror(
        model_pb2.GetModelResponse,
        info,
        model_revision=info.revision,
        max_image_bytes=config.max_image_bytes,
        max_image_pixels=config.max_image_pixels,
        generation_defaults=_mirror(model_pb2.GenerationDefaults, info.generation_defaults),
        policy_details=[_policy(policy) for policy in info.policy_details],
    )


def status_response(status: EngineStatus) -> model_pb2.GetServerStatusResponse:
    """The answer of `GetServerStatus`."""
    return _mirror(model_pb2.GetServerStatusResponse, status, version=__version__)


def adapter(loaded: LoadedAdapter) -> adapter_pb2.Adapter:
    """One adapter of `ListAdapters`."""
    now = {"num_requests": loaded.num_requests, "is_unloading": loaded.is_unloading}
    return _mirror(adapter_pb2.Adapter, loaded.info, **now)


def _policy(policy: PolicyInfo) -> model_pb2.Policy:
    is_before = policy.is_before_decoder
    return _mirror(
        model_pb2.Policy,
        policy,
        stage=model_pb2.POLICY_STAGE_BEFORE_DECODER if is_before else model_pb2.POLICY_STAGE_AFTER_FIRST_LAYER,
        parameters=[_mirror(model_pb2.PolicyParameter, each, default_value=each.default) for each in policy.parameters],
    )


def _add_started(response: generation_pb2.GenerateResponse, started: generation_pb2.Started) -> None:
    response.request_id = started.request_id
    response.model_id = started.model_id
    response.model_revision = started.model_revision
    response.seed = started.seed
    response.selections.extend(started.selections)
    if started.HasField("looked_at"):
        response.looked_at.CopyFrom(started.looked_at)


def _add_finished(response: generation_pb2.Choice, finished: generation_pb2.Finished) -> None:
    response.finish_reason = finished.finish_reason
    match finished.WhichOneof("matched_stop"):
        case "matched_stop_string":
            response.matched_stop_string = finished.matched_stop_string
        case "matched_stop_token_id":
            response.matched_stop_token_id = finished.matched_stop_token_id
    response.usage.CopyFrom(finished.usage)
    response.cross_kv_bytes.CopyFrom(finished.cross_kv_bytes)
    response.timings.CopyFrom(finished.timings)


def _delta(chunk: TokenDelta) -> generation_pb2.TokenDelta:
    return _mirror(generation_pb2.TokenDelta, chunk, logprobs=[_logprob(entry) for entry in chunk.logprobs])


def _logprob(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return generation_pb2.TokenLogprob(logprob=entry.logprob, top=top)


def _mirror(message_type: type[M], source: object, **others: Any) -> M:
    """A message filled from the source's attributes of the same names, and from `others`."""
    names = {field.name for field in message_type.DESCRIPTOR.fields} - others.keys()
    return message_type(**{name: getattr(source, name) for name in names}, **others)
