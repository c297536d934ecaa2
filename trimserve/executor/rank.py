"""A rank beside rank 0: what it is told to be, and how it follows plans.

Rank 0 draws the tokens, decides what trimming keeps and says what time it is, so that all ranks take the same steps.
"""

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig, ModelConfig
from trimserve.executor.local import LocalExecutor
from trimserve.executor.model import Model
from trimserve.model.loading import describe_model
from trimserve.model.ranks import RankGroup, Shard, connect

__all__ = ["Description", "Done", "Follower", "Order", "Setup", "describe", "follow", "join"]


class Setup(NamedTuple):
    """What a rank is to be."""

    config: ModelConfig
    limits: EngineConfig
    shard: Shard
    store: Path
    """See `ranks.connect`."""
    num_threads: int


class Description(NamedTuple):
    """What ranks must agree on before they load."""

    info: ModelInfo
    torch: str


class Order(NamedTuple):
    """A method of the executor to call on every rank."""

    name: str
    arguments: tuple[object, ...] = ()


class Done(NamedTuple):
    """A rank has taken an order that is no step, or has loaded."""


def describe(setup: Setup) -> Description:
    """What this rank finds at the checkpoint."""
    return Description(describe_model(setup.config, setup.limits), torch.__version__)


def join(setup: Setup, info: ModelInfo, timeout_seconds: float, connections: Sequence[Connection]) -> RankGroup:
    """Meet the other ranks, on this one's device and with its number of threads; see `ranks.connect`."""
    torch.set_num_threads(setup.num_threads)
    device = torch.device(info.device)
    if device.type == "cuda":
        device = torch.device("cuda", setup.shard.rank)
        torch.cuda.set_device(device)
    return connect(setup.shard, device, setup.store, timeout_seconds, connections)


class Follower(LocalExecutor):
    """Runs the plans of rank 0 without drawing: they name the tokens."""

    def __init__(self, model: Model, group: RankGroup, image_cache_bytes: int = 0) -> None:
        """Hold no pages yet.

        Args:
            model: this rank's part.
            group: hears rank 0.
            image_cache_bytes: the same as of rank 0, so that both hold the same images.
        """
        super().__init__(model, image_cache_bytes, clock=lambda: group.hear(float), is_fatal=lambda _: True)

    def _draw_first(self, logits: Tensor, held: object, step: object) -> None:
        """Rank 0 has the logits."""

    def _draw(self, logits: Tensor, rows: object, batch: object, step: object) -> None:
        """The same."""


def follow(executor: Follower, group: RankGroup, reply: Callable[[object], None]) -> None:
    """Take orders for ever.

    Args:
        executor: of this rank.
        group: hears rank 0.
        reply: called with `Done` after every order that is no step.
    Raises:
        EOFError: rank 0 is gone.
    """
    while True:
        order = group.hear(Order)
        getattr(executor, order.name)(*order.arguments)
        if order.name != "run":
            reply(Done())
