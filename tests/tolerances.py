"""Every tolerance that a test uses, each with its reason."""

from typing import TypedDict

__all__ = ["HEADWISE_SCORES", "LOGITS", "LOGITS_BFLOAT16", "Tolerance"]


class Tolerance(TypedDict):
    """Keyword arguments of `torch.testing.assert_close`."""

    rtol: float
    atol: float


# Both sides read the same rounded inputs, so the input dtype does not matter. What is left is accumulation in
# float32 (over Dh products, N exponentials, T rows) against float64. A logit of magnitude L is off by about
# L * 2^-24, and the tests draw logits up to about 30.
HEADWISE_SCORES: Tolerance = {"rtol": 1e-5, "atol": 1e-9}

# Logits in float32 with a standard deviation of 1 to 4, through up to 7 layers: rounding of different matmul
# shapes and of another attention kernel, about 1e-5. A wrong mask moves them by 0.1 and more.
LOGITS = 1e-4

# Share of the logits' standard deviation that rounding weights and activations to bfloat16 may take.
LOGITS_BFLOAT16 = 0.1
