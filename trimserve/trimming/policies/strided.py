"""The policy `strided`, a control: features that are evenly spaced."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from trimserve.trimming.budget import Allowance
from trimserve.trimming.policies.policy import AfterFirstLayer, Choice, SeenImage

__all__ = ["Strided"]


@dataclass(frozen=True, slots=True)
class Strided(AfterFirstLayer):
    """As many features as the budget allows, evenly spaced: the middles of equal stretches of the image.

    These are features floor((j + 1/2) * n / count) for each j. The second control beside `random`: it looks at nothing
    but covers the image.
    """

    name: ClassVar[str] = "strided"

    def choose(self, image: SeenImage, allowance: Allowance) -> Choice:
        """See `AfterFirstLayer.choose`."""
        count = allowance.count(image.scores.mean(dim=0))
        places = torch.arange(count, device=image.features.device)
        return Choice((2 * places + 1) * image.num_features // (2 * count))
