"""Every policy by its name."""

from collections.abc import Mapping

from trimserve.models.policies.cdpruner import CDPruner
from trimserve.models.policies.fastv import FastV
from trimserve.models.policies.mean import Mean
from trimserve.models.policies.mmr import Mmr
from trimserve.models.policies.policy import Policy
from trimserve.models.policies.random import Random
from trimserve.models.policies.sparsevlm import SparseVLM
from trimserve.models.policies.strided import Strided
from trimserve.models.policies.trimmed import Trimmed

__all__ = ["POLICIES"]

_ALL: tuple[type[Policy], ...] = (Trimmed, Random, Strided, Mean, FastV, SparseVLM, Mmr, CDPruner)

POLICIES: Mapping[str, type[Policy]] = {policy.name: policy for policy in _ALL}
"""The first is the default."""
