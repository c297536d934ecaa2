"""A trimserve server in a process of its own, and what asks it."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import grpc

from benchmarks.load import Answer, Ask, Item
from trimserve.client import Client, make_request
from trimserve.process import ServerProcess, server_process
from trimserve.v1 import generation_pb2 as pb

__all__ = ["asking", "running_server"]


def running_server(
    model: Path | None, *, num_threads: int, flags: Sequence[object] = ()
) -> AbstractContextManager[ServerProcess]:
    """A server of a checkpoint or of the embedded model, until the block ends; it logs only what is wrong."""
    checkpoint = () if model is None else ("--model", model)
    return server_process(*map(str, ("--num-threads", num_threads, "--log-level", "warning", *flags, *checkpoint)))


def asking(client: Client, max_new_tokens: int, trim: pb.TrimOptions) -> Ask:
    """What streams greedy answers of so many tokens, exactly: end tokens are ignored.

    That a call was tried again, as clients do, counts as waiting.
    """
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, temperature=0)

    def ask(item: Item) -> Answer:
        arrivals: list[float] = []
        token_ids: list[int] = []
        try:
            for event in client.stream(make_request(item.question, item.images, sampling=sampling, trim=trim)):
                if event.delta.token_ids:
                    arrivals.append(time.monotonic())
                    token_ids += event.delta.token_ids
        except grpc.RpcError as error:
            return Answer(error=f"{error.code().name}: {error.details()}")
        return Answer(tuple(arrivals), len(token_ids), tuple(token_ids))

    return ask
