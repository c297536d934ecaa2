"""Every policy by its name."""

from collections.abc import Mapping

from trimserve.models.policies.policy import Policy
from trimserve.models.policies.random import Random
from trimserve.models.policies.strided import Strided
from trimserve.models.policies.trimmed import Trimmed

__all__ = ["POLICIES"]

POLICIES: Mapping[str, type[Policy]] = {policy.name: policy for policy in (Trimmed, Random, Strided)}
"""The first is the default."""
