"""The processes that share a model, each seen as a *rank*: the sums, gathers and decisions that keep them in step.

Rank 0 decides and tells; the others hear. All ranks call the same methods in the same order, so whatever goes wrong in
one of them is an error of all (`RankFailed`). It knows neither processes nor what is summed.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from trimserve.errors import RankFailed
from trimserve.trimming.policies.policy import Verdict
from trimserve.trimming.selection import AHEAD, KeptSet, Selection

__all__ = ["ALONE", "UNSHARDED", "RankGroup", "Ranks", "Shard", "connect"]

T = TypeVar("T")

_distributed: Any = torch.distributed  # its backends have no types

_CONNECT: Final = timedelta(seconds=120)
"""For all ranks to find each other once each of them has begun."""


class _Collectives(Protocol):
    """What is needed of a backend of torch.distributed."""

    def allreduce(self, tensors: list[Tensor]) -> Any: ...

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Any: ...


class Shard(NamedTuple):
    """Which part of a model a rank holds."""

    rank: int = 0
    size: int = 1
    """Ranks that share the model."""

    def even(self, total: int) -> slice:
        """This rank's part of so many things, which `size` divides."""
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def equal(self, total: int) -> slice:
        """The same where `size` need not divide: parts are equally large, so the last ones may overlap."""
        part = -(-total // self.size)
        start = min(self.rank * part, total - part)
        return slice(start, start + part)


UNSHARDED: Final = Shard()


class _Decided(NamedTuple):
    """What rank 0 chose, as plain data."""

    answer: KeptSet | Verdict


class Ranks:
    """A process that has a model for itself: nothing is to be summed, gathered or told."""

    shard: Shard = UNSHARDED

    def sum(self, rows: Tensor) -> Tensor:
        """Add up what every rank has, maybe in place; every rank gets the sum."""
        return rows

    def gather(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks, equally large, in order; on other ranks than 0 only their own."""
        return [part]

    def decide(self, choose: Callable[[], Selection | Verdict], device: torch.device) -> Selection | Verdict:
        """What rank 0 chooses.

        Args:
            choose: called on rank 0 only.
            device: of this rank.
        Returns:
            The choice; picks are known on rank 0 only.
        """
        del device
        return choose()


ALONE: Final = Ranks()


class RankGroup(Ranks):
    """One of several processes that share a model; used by one thread at a time."""

    def __init__(self, shard: Shard, collectives: _Collectives, connections: Sequence[Connection]) -> None:
        """Use `connect`.

        Args:
            shard: of this rank.
            collectives: of all ranks.
            connections: of rank 0 to each other rank in order; of another rank the one to rank 0.
        """
        self.shard = shard
        self._collectives = collectives
        self._connections = connections

    def sum(self, rows: Tensor) -> Tensor:
        """See `Ranks.sum`."""
        with _shared("a sum"):
            self._collectives.allreduce([rows]).wait()
        return rows

    def gather(self, part: Tensor) -> list[Tensor]:
        """See `Ranks.gather`."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.shard.size)] if self.shard.rank == 0 else []
        with _shared("a gather"):
            self._collectives.gather([parts] if parts else [], [part]).wait()
        return parts or [part]

    def decide(self, choose: Callable[[], Selection | Verdict], device: torch.device) -> Selection | Verdict:
        """See `Ranks.decide`."""
        if self.shard.rank:
            answer = self.hear(_Decided).answer
            return answer.selection(device) if isinstance(answer, KeptSet) else answer
        chosen = choose()
        self.tell(_Decided(KeptSet.of(chosen, AHEAD) if isinstance(chosen, Selection) else chosen))
        return chosen

    def tell(self, message: object) -> None:
        """Send plain data from rank 0 to every other rank.

        Raises:
            RankFailed: one of them is gone, or takes no message for as long as a sum may take.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with _shared("a message"):
            for connection in self._connections:
                connection.send_bytes(data)

    def hear(self, kind: type[T]) -> T:
        """Wait for what rank 0 tells next.

        Args:
            kind: what it must be.
        Raises:
            EOFError: rank 0 is gone.
            RankFailed: it is something else.
        """
        message = pickle.loads(self._connections[0].recv_bytes())  # of our own parent
        if not isinstance(message, kind):
            raise RankFailed(f"ranks are not in step: expected {kind.__name__}, got {type(message).__name__}")
        return message


def connect(
    shard: Shard, device: torch.device, store: Path, timeout_seconds: float, connections: Sequence[Connection]
) -> RankGroup:
    """Meet the other ranks of this machine: by gloo over loopback on a CPU, by NCCL on GPUs.

    Args:
        shard: of this rank.
        device: of this rank.
        store: a file that does not exist yet, the same for all ranks.
        timeout_seconds: that a collective may take.
        connections: see `RankGroup`.
    Raises:
        RankFailed: another rank did not come.
    """
    with _shared("the first meeting"):
        file = _distributed.FileStore(str(store), shard.size)
        backend = _nccl if device.type == "cuda" else _gloo
        collectives = backend(file, shard, timedelta(seconds=timeout_seconds))
    group = RankGroup(shard, collectives, connections)
    group.sum(torch.zeros(1, device=device))  # NCCL connects when something is summed first
    return group


def _gloo(store: object, shard: Shard, timeout: timedelta) -> _Collectives:
    # Not `init_process_group`, which keeps one group for the whole process: a program may serve two models.
    gloo = _distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = _CONNECT
    group = gloo(store, *shard, options)
    group._set_default_timeout(timeout)
    collectives: _Collectives = group
    return collectives


def _nccl(store: object, shard: Shard, timeout: timedelta) -> _Collectives:
    nccl = _distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    collectives: _Collectives = nccl(store, *shard, options)
    return collectives


@contextmanager
def _shared(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RankFailed(f"{what} of all ranks failed: {error}") from error
