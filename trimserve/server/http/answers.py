"""From the api's chunks to OpenAI's objects: a `chat.completion`, or the `chat.completion.chunk`s of a stream.

The object `trimserve` has what OpenAI's shape has no place for: the account of visual features and their bytes, times,
the seed. It comes with the whole answer, where of several choices it is that of choice 0, or with each chunk that has
a `finish_reason`, where it is that of its choice.
"""

import base64
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trimserve.api.chunks import Finished, GenerationChunk, ImageSelection, Started, TokenDelta, TokenLogprob
from trimserve.api.info import ModelInfo
from trimserve.server.http.schema import ChatRequest

__all__ = ["AnswerWriter", "TokenBytes"]

TokenBytes = Callable[[Sequence[int]], tuple[bytes, ...]]
"""What each of some tokens adds to a text."""

Json = dict[str, Any]

LEAST = -9999.0
"""OpenAI's log-probability of a token that cannot be; JSON has no infinity."""


class AnswerWriter:
    """Writes the answer to one request."""

    def __init__(self, request: ChatRequest, request_id: str, info: ModelInfo, token_bytes: TokenBytes) -> None:
        """Begin an answer.

        Args:
            request: what was asked; only what concerns the answer is kept.
            request_id: names it.
            info: of the model.
            token_bytes: for log-probabilities.
        """
        self._head: Json = {
            "id": f"chatcmpl-{request_id}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": info.revision,
        }
        self._num_choices = 1 if request.n is None else request.n
        self._with_logprobs = bool(request.logprobs)
        self._with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        self._token_bytes = token_bytes
        self._started: Started | None = None
        self._ended: list[Finished] = []

    def chunks(self, chunk: GenerationChunk) -> Iterator[Json]:
        """What a stream says of the next chunk."""
        match chunk:
            case TokenDelta():
                logprobs = self._logprobs(chunk)
                if chunk.text or logprobs is not None:
                    yield self._streamed(chunk.choice, {"content": chunk.text}, logprobs)
            case Started():
                self._started = chunk
                for choice in range(self._num_choices):
                    yield self._streamed(choice, {"role": "assistant", "content": "", "refusal": None})
            case Finished():
                self._ended.append(chunk)
                last = self._streamed(chunk.choice, {}, None, chunk.reason.value)
                yield {**last, "trimserve": self._extension(chunk)}
                if self._with_usage and len(self._ended) == self._num_choices:
                    yield self._object("chat.completion.chunk", [], usage=_usage(self._ended))

    def whole(self, chunks: Sequence[GenerationChunk]) -> Json:
        """The answer at once; a fold over all chunks."""
        deltas: dict[int, list[TokenDelta]] = {}
        ends: dict[int, Finished] = {}
        for chunk in chunks:
            match chunk:
                case Started():
                    self._started = chunk
                case TokenDelta():
                    deltas.setdefault(chunk.choice, []).append(chunk)
                case Finished():
                    ends[chunk.choice] = chunk
        choices = [self._choice(deltas[number], ends[number]) for number in sorted(ends)]
        answer = self._object("chat.completion", choices, usage=_usage([*ends.values()]))
        return {**answer, "trimserve": self._extension(ends[0])}

    def _choice(self, deltas: Sequence[TokenDelta], finished: Finished) -> Json:
        joined = TokenDelta.joined(deltas)
        return {
            "index": finished.choice,
            "message": {"role": "assistant", "content": joined.text, "refusal": None},
            "logprobs": self._logprobs(joined),
            "finish_reason": finished.reason.value,
        }

    def _streamed(
        self, choice: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        streamed = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage: Json = {"usage": None} if self._with_usage else {}
        return self._object("chat.completion.chunk", [streamed], **usage)

    def _object(self, kind: str, choices: list[Json], **others: Any) -> Json:
        return {**self._head, "object": kind, "choices": choices, **others}

    def _logprobs(self, delta: TokenDelta) -> Json | None:
        """Of the tokens of a delta; None if they were not asked for, or there are none."""
        if not self._with_logprobs or not delta.token_ids:
            return None
        entries = zip(delta.token_ids, delta.logprobs, strict=True)
        return {"content": [self._logprob(*entry) for entry in entries], "refusal": None}

    def _logprob(self, token_id: int, entry: TokenLogprob) -> Json:
        drawn, *top = self._token_bytes([token_id, *(each for each, _ in entry.top)])
        alternatives = [_token(each, logprob) for each, (_, logprob) in zip(top, entry.top, strict=True)]
        return {**_token(drawn, entry.logprob), "top_logprobs": alternatives}

    def _extension(self, finished: Finished) -> Json:
        started = self._started
        assert started is not None
        return {
            "request_id": started.request_id,
            "seed": started.seed,
            "matched_stop": finished.matched_stop,
            "images": [dataclasses.asdict(image) for image in started.images],
            "cross_kv_bytes": dataclasses.asdict(finished.cross_kv),
            "timings": dataclasses.asdict(finished.timings),
            **({"selections": [_selection(each) for each in started.selections]} if started.selections else {}),
            **({} if started.looked_at is None else {"looked_at": dataclasses.asdict(started.looked_at)}),
        }


def _token(content: bytes, logprob: float) -> Json:
    return {"token": content.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(content)}


def _selection(selection: ImageSelection) -> Json:
    heads = [base64.b64encode(bitmap).decode() for bitmap in selection.picks_by_head]
    kept = base64.b64encode(selection.kept).decode()
    return {**dataclasses.asdict(selection), "kept": kept, "picks_by_head": heads}


def _usage(ends: Sequence[Finished]) -> Json:
    """Of all choices; the prompt is read once for them."""
    prompt, generated = ends[0].num_prompt_tokens, sum(each.num_generated_tokens for each in ends)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
