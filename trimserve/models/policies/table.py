"""Every policy by its name; `docs/algorithms.md` lists them with source, formula and test."""

from collections.abc import Mapping

from trimserve.models.policies.cdpruner import CDPruner
from trimserve.models.policies.cls import Cls
from trimserve.models.policies.codebook import Codebook
from trimserve.models.policies.divprune import DivPrune
from trimserve.models.policies.fastv import FastV
from trimserve.models.policies.gprune import GPrune
from trimserve.models.policies.guided import Guided
from trimserve.models.policies.mean import Mean
from trimserve.models.policies.mmr import Mmr
from trimserve.models.policies.policy import Policy
from trimserve.models.policies.pool import Pool
from trimserve.models.policies.random import Random
from trimserve.models.policies.sparsevlm import SparseVLM
from trimserve.models.policies.strided import Strided
from trimserve.models.policies.todre import ToDRE
from trimserve.models.policies.topv import TopV
from trimserve.models.policies.trimmed import Trimmed
from trimserve.models.policies.vflowopt import VFlowOpt
from trimserve.models.policies.visiondrop import VisionDrop
from trimserve.models.policies.vispruner import VisPruner

__all__ = ["POLICIES"]

_AFTER_FIRST_LAYER = (Trimmed, Random, Strided, Mean, FastV, SparseVLM, Mmr, CDPruner, Guided)
_BEFORE_DECODER = (Cls, VisPruner, VisionDrop, GPrune, DivPrune, ToDRE, VFlowOpt, TopV, Codebook, Pool)

POLICIES: Mapping[str, type[Policy]] = {policy.name: policy for policy in (*_AFTER_FIRST_LAYER, *_BEFORE_DECODER)}
"""The first is the default."""
