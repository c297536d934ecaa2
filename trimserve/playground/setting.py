"""One way to trim, as the page's controls say it."""

from dataclasses import dataclass
from typing import Final

from trimserve.client import make_request
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import model_pb2

__all__ = ["OFF", "Question", "Setting", "policy_names"]

OFF: Final = "off"
"""In place of a policy: every feature stays."""


def policy_names(model: model_pb2.GetModelResponse) -> list[str]:
    """What a setting may choose: the policies that the server can use now, and none.

    Args:
        model: that is served.
    """
    return [*(policy.name for policy in model.policy_details if policy.is_available), OFF]


@dataclass(frozen=True, slots=True)
class Setting:
    """Values of the controls."""

    policy: str
    """A name, or `OFF`."""
    budget: float
    """The budget of a head, or of an image where the policy chooses before the decoder and has no heads. In (0, 1]."""
    merge_ratio: float
    """Rows for what does not stay, as a share. In [0, 1]."""

    def trim_options(self, model: model_pb2.GetModelResponse) -> pb.TrimOptions:
        """The contract's options, which ask for the kept set, too.

        Args:
            model: that is served; knows the policies.
        """
        if self.policy == OFF:
            return pb.TrimOptions(mode=pb.TRIM_MODE_OFF, return_selection=True)
        options = pb.TrimOptions(policy=self.policy, merge_ratio=self.merge_ratio, return_selection=True)
        known = {policy.name: policy for policy in model.policy_details}
        if self.policy not in known or known[self.policy].stage != model_pb2.POLICY_STAGE_BEFORE_DECODER:
            options.k_ratio = self.budget
        elif "ratio" in known[self.policy].budgets:
            options.budget.ratio = self.budget
        return options


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked under every setting."""

    text: str
    image: bytes | None
    """Content of its file."""
    max_new_tokens: int
    temperature: float

    def request(self, setting: Setting, model: model_pb2.GetModelResponse) -> pb.GenerateRequest:
        """The request under a setting.

        Args:
            setting: how to trim.
            model: that is served.
        """
        sampling = pb.SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=0)
        images = [] if self.image is None else [self.image]
        return make_request(self.text, images, sampling=sampling, trim=setting.trim_options(model))
