"""An executor whose model is shared by several processes of this machine.

This process is rank 0: it runs plans as `LocalExecutor` does, draws the tokens, and tells the other ranks the same
plans, with the tokens in them. Any error on any rank ends the executor, because the others cannot know of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from trimserve.api.adapter import AdapterInfo
from trimserve.api.constraint import Constraint
from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import AdapterError, RankFailed
from trimserve.executor.local import LocalExecutor
from trimserve.executor.model import Model
from trimserve.executor.plan import Rows, StepPlan, StepResult
from trimserve.executor.rank import Description, Done, Order, Setup, describe, join
from trimserve.executor.rank_processes import RANK_MODULE, RankProcesses
from trimserve.imaging.decode import Decode
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.processor import Processor
from trimserve.model.ranks import RankGroup, Shard

__all__ = ["TensorParallelExecutor", "check_agreement", "start_ranks"]


class TensorParallelExecutor:
    """Rank 0 of several; see `Executor`."""

    def __init__(self, model: Model, group: RankGroup, processes: RankProcesses, image_cache_bytes: int = 0) -> None:
        """Use `start_ranks`."""
        self._group = group
        self._processes = processes
        self._local = LocalExecutor(model, image_cache_bytes, self._now, is_fatal=lambda _: True)
        self._last: dict[int, int] = {}
        """The token that each sequence drew last."""

    @property
    def info(self) -> ModelInfo:
        """See `Executor.info`."""
        return self._local.info

    @property
    def runs_ahead(self) -> bool:
        """The other ranks are told tokens, so these must be known."""
        return False

    def allocate(self, num_pages: int, layers_per_page: int) -> None:
        """See `Executor.allocate`."""
        with self._all("allocate", num_pages, layers_per_page):
            self._local.allocate(num_pages, layers_per_page)

    def free_pages(self) -> None:
        """See `Executor.free_pages`."""
        with self._all("free_pages"):
            self._local.free_pages()

    def warm_up(self, max_batch: int) -> None:
        """See `Executor.warm_up`; steps of several ranks are not captured."""
        self._local.warm_up(max_batch)

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Refuse it."""
        raise AdapterError(f"{folder}: adapter {name!r}: adapters do not work with tensor_parallel")

    def unload_adapter(self, name: str) -> None:
        """None is loaded."""
        raise AssertionError(f"adapter {name} cannot have been loaded")

    def compile(self, constraint: Constraint) -> None:
        """See `Executor.compile`."""
        self._local.compile(constraint)

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """See `Executor.watch`."""
        self._processes.watch(on_failure)

    def close(self) -> None:
        """See `Executor.close`."""
        self._processes.close()

    def run(self, plan: StepPlan) -> StepResult:
        """See `Executor.run`."""
        for number in plan.ended:
            self._last.pop(number, None)
        self._last.update({new.sequence: new.generated_token_ids[-1] for new in plan.new if new.generated_token_ids})
        try:
            self._group.tell(Order("run", (self._for_others(plan),)))
            result = self._local.run(plan)
        except Exception as error:
            raise self._processes.cause_of(error) from error
        self._last.update({drawn.sequence: drawn.token_id for drawn in result.drawn if not drawn.choice})
        return result

    @contextmanager
    def _all(self, method: str, *arguments: object) -> Iterator[None]:
        """Let all other ranks call a method, too, and wait for them."""
        try:
            self._group.tell(Order(method, arguments))
            yield
            self._processes.replies(Done)
        except RankFailed as error:
            raise self._processes.cause_of(error) from error

    def _for_others(self, plan: StepPlan) -> StepPlan:
        """What ranks need that draw nothing."""
        new = tuple(replace(each, constraint=None, choices=()) for each in plan.new)
        return replace(plan, new=new, rows=tuple(map(self._with_tokens, plan.rows)))

    def _with_tokens(self, rows: Rows) -> Rows:
        return rows if rows.token_ids else replace(rows, token_ids=(self._last[rows.sequence],))

    def _now(self) -> float:
        """Seconds, the same on all ranks: by them a slice of a prefill ends."""
        now = time.monotonic()
        self._group.tell(now)
        return now


def start_ranks(
    config: ModelConfig, limits: EngineConfig, decode: Decode | None = None, module: Sequence[str] = RANK_MODULE
) -> tuple[Processor, TensorParallelExecutor]:
    """Start the other ranks, and load the model together.

    Args:
        config: which checkpoint, and how it is read.
        limits: how many ranks, at least 2.
        decode: decodes image files, see `Processor`.
        module: what the interpreter of another rank runs.
    Returns:
        What prepares requests, and the executor, to be closed.
    Raises:
        CheckpointError: as `load_model`.
        RankFailed: a rank failed while it began, or found something else than rank 0.
    """
    size = limits.tensor_parallel
    num_threads = limits.num_threads or max(1, torch.get_num_threads() // size)
    processes = RankProcesses(size, limits.step_timeout_seconds, module)
    try:
        shards = [Shard(rank, size) for rank in range(size)]
        setup, *others = (Setup(config, limits, shard, processes.store, num_threads) for shard in shards)
        processes.tell(others)
        own = describe(setup)
        check_agreement(own, processes.replies(Description))
        processes.tell([Done()] * len(others))

        def load() -> tuple[RankGroup, Mllama]:
            """Join the ranks, and load this one's share."""
            group = join(setup, own.info, limits.step_timeout_seconds, processes.connections)
            return group, load_model(config, limits, decode, group)

        group, model = processes.unless_one_ends(load)
        processes.replies(Done)
    except BaseException:
        processes.close()
        raise
    return model.processor, TensorParallelExecutor(model, group, processes, limits.image_cache_bytes)


def check_agreement(own: Description, others: Sequence[Description]) -> None:
    """Check that all ranks found the same checkpoint, and have the same torch.

    Args:
        own: of rank 0.
        others: of the ranks from 1 on.
    Raises:
        RankFailed: names the first thing that differs.
    """
    for rank, other in enumerate(others, start=1):
        pairs = {each.name: (getattr(own.info, each.name), getattr(other.info, each.name)) for each in fields(own.info)}
        for name, (ours, theirs) in {**pairs, "torch": (own.torch, other.torch)}.items():
            if ours != theirs:
                raise RankFailed(f"ranks disagree: {name} is {ours!r} on rank 0, {theirs!r} on rank {rank}")
