"""No memory for several at once: each is tried alone, and gets what it gets alone.

A quarter of `--mixes` is tried.
"""

import random
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from tests.engine.test_random_mixes import Mix
from tests.engine.test_real_model import model
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled, ToPrefill

__all__ = ["model"]  # the fixture

_LAYERS = 7
"""Of the model: a pass breaks before, within or behind them."""
_EVERYTHING = 10**6


class ShortOfMemory(Mllama):
    """A model that now and then has no memory for several prompts or rows."""

    def __init__(self, model: Mllama, seed: int) -> None:
        """Be a model.

        Args:
            model: with everything that it has.
            seed: of when it fails.
        """
        self.__dict__.update(model.__dict__)
        self._rng = random.Random(f"faults/{seed}")
        self.num_faults = 0

    def prefill_together(self, prompts: Sequence[ToPrefill]) -> Interruptible[list[Prefilled]]:
        breaks = len(prompts) > 1 and self._rng.random() < 0.5
        most = self._rng.randint(0, 2 * _LAYERS)
        work = super().prefill_together(prompts)
        for _ in range(most if breaks else _EVERYTHING):
            try:
                yield next(work)
            except StopIteration as end:
                if breaks:
                    break
                result: list[Prefilled] = end.value
                return result
        self._fail()

    def decode(
        self, token_ids: Sequence[int] | Tensor, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None
    ) -> Tensor:
        logits = super().decode(token_ids, kvs, num_rows)
        if len(kvs) > 1 and self._rng.random() < 0.1:
            self._fail()  # behind the work: keys, values and lengths have changed
        return logits

    def _fail(self) -> NoReturn:
        self.num_faults += 1
        raise torch.OutOfMemoryError("drawn by the test")


def test_a_batch_that_finds_no_memory_harms_nobody(model: Mllama, mixes: int) -> None:
    by_rounding = num_faults = 0
    for seed in range(mixes // 4):
        short = ShortOfMemory(model, seed)
        mix = Mix(model, seed, short)
        mix.arrivals = [(min(step, 2), wanted) for step, wanted in mix.arrivals]  # so that prompts share passes
        by_rounding += mix.run()
        num_faults += short.num_faults
    assert by_rounding <= mixes // 20
    assert num_faults >= mixes // 4
