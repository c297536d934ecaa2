"""Ranks as threads of one process: the same collectives, without the time that processes take to begin."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

import torch

from tests.patience import PATIENCE_SECONDS
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.ranks import RankGroup, Shard, connect

__all__ = ["ThreadRanks"]

T = TypeVar("T")


class ThreadRanks:
    """Each rank's group on a thread of its own; closing it lets no thread wait for another any more."""

    def __init__(self, size: int, folder: Path, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Let them meet.

        Args:
            size: ranks.
            folder: an empty one.
            timeout_seconds: of a collective.
        """
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(size)]
        self._folder = folder
        self._timeout_seconds = timeout_seconds
        self._num_meetings = 0
        self.groups: list[RankGroup] = self._met()

    def meet_again(self) -> None:
        """Connect the same groups anew, after one of them has left."""
        for group, fresh in zip(self.groups, self._met(), strict=True):
            group._collectives, group._connections = fresh._collectives, fresh._connections

    def _met(self) -> list[RankGroup]:
        size, self._num_meetings = len(self._threads), self._num_meetings + 1
        store = self._folder / f"store-{self._num_meetings}"
        pipes = [Pipe() for _ in range(1, size)]
        ends = [[ours for ours, _ in pipes], *([theirs] for _, theirs in pipes)]

        def meet(rank: int) -> RankGroup:
            return connect(Shard(rank, size), torch.device("cpu"), store, self._timeout_seconds, ends[rank])

        return self.run(meet)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What each rank returns, working at the same time."""
        jobs = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        return [job.result(PATIENCE_SECONDS) for job in jobs]

    def start(self, rank: int, work: Callable[[], T]) -> "Future[T]":
        """Let one rank work."""
        return self._threads[rank].submit(work)

    def load(self, config: ModelConfig) -> list[Mllama]:
        """Each rank's part of a model; one after the other, since transformers patches torch while it makes one."""
        limits = EngineConfig(tensor_parallel=len(self.groups))
        return [load_model(config, limits, ranks=group) for group in self.groups]

    def leave(self, rank: int) -> None:
        """Close a rank's connections, as the end of its process would; by no other thread while it works."""
        group: Any = self.groups[rank]
        group._collectives = None
        for connection in group._connections:
            connection.close()

    def close(self) -> None:
        """End the threads."""
        for rank in range(len(self.groups)):
            self.leave(rank)
        for thread in self._threads:
            thread.shutdown()
