"""The policy `random`, a control: features drawn without looking."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random(AfterFirstLayer):
    """As many features as the budget allows, drawn uniformly.

    What another policy answers better at the same count is what its choice is worth. The seed is the image's index, n
    and the count, so the draw of a request is the same on every run, on every machine and in every batch.
    """

    name: ClassVar[str] = "random"

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        count = allowance.count(image.scores.mean(dim=0))
        # Python's generator and not torch's: its stream for a seed is the same in every version.
        rng = random.Random(f"{image.index}/{image.num_features}/{count}")
        drawn = sorted(rng.sample(range(image.num_features), count))
        return Choice(torch.tensor(drawn, device=image.features.device))
