"""The model's decode step without a service around it, timed in a process of its own."""

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.serve.workload import Item
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.trimming.plan import TrimPlan

__all__ = ["BareModel"]

_POOL_BYTES = 256 * 2**20


class BareModel:
    """A process that has the model and nothing else; a context manager."""

    def __init__(self, model: Path | None, *, num_threads: int, max_kept_fraction: float | None) -> None:
        """Start it when first asked.

        Args:
            model: folder of a checkpoint; None is the embedded model.
            num_threads: of one op.
            max_kept_fraction: as in a request's `trim`.
        """
        self._max_kept_fraction = max_kept_fraction
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(model, num_threads)
        )

    def __enter__(self) -> "BareModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    async def step_seconds(self, item: Item, num_steps: int) -> list[float]:
        """Prefill an item and time decode steps at batch 1, one after the other."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._process, _step_seconds, item, self._max_kept_fraction, num_steps)


_model: Mllama | None = None  # a worker process has no other place to keep it


def _load(folder: Path | None, num_threads: int) -> None:
    global _model
    torch.set_num_threads(num_threads)
    _model = load_model(ModelConfig(model=None if folder is None else str(folder)), EngineConfig())


@torch.inference_mode()
def _step_seconds(item: Item, max_kept_fraction: float | None, num_steps: int) -> list[float]:
    assert _model is not None
    info = _model.info
    trim = TrimPlan.of(
        TrimRequest(
            k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio, max_kept_fraction=max_kept_fraction
        )
    )
    images = [ImageFile(image) for image in item.images]
    prompt = _model.prepare(ChatPrompt((Message("user", (*images, Text(item.question))),)))
    features = [run_through(_model.encode_image(each)) for each in prompt.images]
    num_features = sum(each.num_features for each in features)
    kv = OwnPages(info, _POOL_BYTES).key_values(len(prompt.token_ids) + num_steps, num_features)
    prefilled = run_through(_model.prefill(prompt, features, trim, kv))
    token_id = int(prefilled.logits.argmax())
    seconds = []
    for _ in range(num_steps):
        start = time.monotonic()
        logits = _model.decode([token_id], [kv])
        seconds.append(time.monotonic() - start)
        token_id = int(logits[0].argmax())
    return seconds
