"""Ranks as threads of one process: the same collectives, without the time that processes take to begin."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import TypeVar

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
        pipes = [Pipe() for _ in range(1, size)]
        ends = [[ours for ours, _ in pipes], *([theirs] for _, theirs in pipes)]

        def meet(rank: int) -> RankGroup:
            shard = Shard(rank, size)
            return connect(shard, torch.device("cpu"), folder / "store", timeout_seconds, ends[rank])

        self.groups: list[RankGroup] = self.run(meet)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What each rank returns, working at the same time."""
        jobs = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        return [job.result(PATIENCE_SECONDS) for job in jobs]

    def load(self, config: ModelConfig) -> list[Mllama]:
        """Each rank's part of a model; one after the other, since transformers patches torch while it makes one."""
        limits = EngineConfig(tensor_parallel=len(self.groups))
        return [load_model(config, limits, ranks=group) for group in self.groups]

    def close(self) -> None:
        """End the threads."""
        for group in self.groups:
            group.leave()
        for thread in self._threads:
            thread.shutdown()
