"""Answers from a running server: any model, any machine, and the path that clients take.

A server tells the likeliest tokens only, so the divergences are lower bounds (`metrics.top_kl_divergence`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, TopP, TrimRequest
from trimserve.client import Client, make_request
from trimserve.evaluation.answers import UNTRIMMED, Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.metrics import top_kl_divergence
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Served"]

_NUM_TOP_LOGPROBS = 20  # the most that a server tells


class Served:
    """A server as an `Answerer`."""

    def __init__(self, client: Client, *, concurrency: int = 16, adapter: str | None = None) -> None:
        """Ask which model it serves.

        Args:
            client: connected to the server.
            concurrency: requests at the same time, at least 1; more than the server's `max_batch` only queue.
            adapter: name of the LoRA adapter that answers; None is the base model.
        Raises:
            grpc.RpcError: the server does not answer.
        """
        self._client = client
        self._concurrency = concurrency
        self._adapter = adapter
        self._model = client.model()

    @property
    def policies(self) -> Sequence[str]:
        """See `Answerer.policies`."""
        return tuple(policy.name for policy in self._model.policy_details if policy.is_available)

    def describe(self) -> dict[str, Any]:
        """The server and its model, for reports."""
        return {
            "model": self._model.model_id,
            "revision": self._model.model_revision,
            "dtype": self._model.dtype,
            "quantization": self._model.quantization,
            "through": f"a server of version {self._client.status().version}",
            **({} if self._adapter is None else {"adapter": self._adapter}),
        }

    def answers(
        self, questions: Iterable[Question], trims: Sequence[TrimRequest], *, max_new_tokens: int | None = None
    ) -> Iterator[list[Answer]]:
        """See `Answerer.answers`; what the server refuses is a `grpc.RpcError`."""
        settings = (UNTRIMMED, *trims)
        runs = ((question, trim) for question in questions for trim in settings)

        def ask(run: tuple[Question, TrimRequest]) -> pb.GenerateResponse:
            """Ask the server a question under a setting."""
            return self._client.generate(_request(*run, max_new_tokens, self._adapter))

        with ThreadPoolExecutor(self._concurrency) as pool:
            responses = pool.map(ask, runs)
            while group := list(islice(responses, len(settings))):
                untrimmed = _first_token(group[0])
                yield [_answer(response, untrimmed) for response in group]


def _request(
    question: Question, trim: TrimRequest, max_new_tokens: int | None, adapter: str | None
) -> pb.GenerateRequest:
    mode = pb.TRIM_MODE_ON if trim.enabled else pb.TRIM_MODE_OFF
    return make_request(
        question.text,
        [question.image],
        adapter=adapter,
        sampling=pb.SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=0,
            repetition_penalty=1,
            num_top_logprobs=_NUM_TOP_LOGPROBS,
        ),
        trim=pb.TrimOptions(
            mode=mode,
            policy=trim.policy,
            k_ratio=trim.k_ratio,
            merge_ratio=trim.merge_ratio,
            budget=_budget(trim.budget),
            parameters=pb.PolicyParameters(**trim.parameters),  # type: ignore[arg-type]  # whole numbers are ints there
        ),
    )


def _budget(budget: Budget | None) -> pb.Budget | None:
    match budget:
        case FixedRatio(ratio):
            return pb.Budget(ratio=ratio)
        case FixedCount(count):
            return pb.Budget(count=count)
        case TopP(share):
            return pb.Budget(top_p=share)
        case Knee():
            return pb.Budget(knee=pb.Knee())
        case None:
            return None


def _first_token(response: pb.GenerateResponse) -> Mapping[int, float]:
    return {top.token_id: top.logprob for top in response.logprobs[0].top}


def _answer(response: pb.GenerateResponse, untrimmed: Mapping[int, float]) -> Answer:
    images = response.usage.images
    return Answer(
        text=response.text,
        num_valid=sum(image.valid_features for image in images),
        num_held=sum(image.kept_features + image.merged_features for image in images),
        divergence=top_kl_divergence(untrimmed, _first_token(response)),
    )
