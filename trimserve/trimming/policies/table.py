"""Every policy by its name; `docs/algorithms.md` lists them with source, formula and test."""

from collections.abc import Mapping

from trimserve.trimming.policies.cdpruner import CDPruner
from trimserve.trimming.policies.cls import Cls
from trimserve.trimming.policies.codebook import Codebook
from trimserve.trimming.policies.divprune import DivPrune
from trimserve.trimming.policies.exit import Exit
from trimserve.trimming.policies.fastv import FastV
from trimserve.trimming.policies.flashsloth import FlashSloth
from trimserve.trimming.policies.gprune import GPrune
from trimserve.trimming.policies.guided import Guided
from trimserve.trimming.policies.mean import Mean
from trimserve.trimming.policies.mmr import Mmr
from trimserve.trimming.policies.policy import Policy
from trimserve.trimming.policies.pool import Pool
from trimserve.trimming.policies.quecc import QueCC
from trimserve.trimming.policies.random import Random
from trimserve.trimming.policies.registers import Registers
from trimserve.trimming.policies.sparsevlm import SparseVLM
from trimserve.trimming.policies.strided import Strided
from trimserve.trimming.policies.todre import ToDRE
from trimserve.trimming.policies.tokenpacker import TokenPacker
from trimserve.trimming.policies.topv import TopV
from trimserve.trimming.policies.trimmed import Trimmed
from trimserve.trimming.policies.vflowopt import VFlowOpt
from trimserve.trimming.policies.visiondrop import VisionDrop
from trimserve.trimming.policies.vispruner import VisPruner
from trimserve.trimming.policies.wico import WiCo

__all__ = ["POLICIES"]

_AFTER_FIRST_LAYER = (Trimmed, Random, Strided, Mean, FastV, SparseVLM, Mmr, CDPruner, Guided, Exit)
_BEFORE_DECODER = (Cls, VisPruner, VisionDrop, GPrune, DivPrune, ToDRE, VFlowOpt, TopV, Codebook, Pool)
_LEARNED = (TokenPacker, WiCo, FlashSloth, QueCC, Registers)

POLICIES: Mapping[str, type[Policy]] = {
    policy.name: policy for policy in (*_AFTER_FIRST_LAYER, *_BEFORE_DECODER, *_LEARNED)
}
"""The first is the default."""
