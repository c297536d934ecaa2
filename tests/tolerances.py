"""Every tolerance that a test uses, each with its reason."""

from typing import TypedDict

import torch

__all__ = [
    "ATTENTION",
    "DECODE_LAYERS",
    "HEADWISE_SCORES",
    "INT8_PAGES",
    "LINEAR",
    "LINEAR_QUANTIZED",
    "LOGITS",
    "LOGITS_BFLOAT16",
    "LOGITS_INT4",
    "LOGITS_INT8",
    "MANY_ROWS_ATTENTION",
    "PAGED_ATTENTION",
    "PRODUCT_OF_A_GPU",
    "SILU_GATE",
    "Tolerance",
]


class Tolerance(TypedDict):
    """Keyword arguments of `torch.testing.assert_close`."""

    rtol: float
    atol: float


# Both sides read the same rounded inputs, so the input dtype does not matter. What is left is accumulation in
# float32 (over Dh products, N exponentials, T rows) against float64. A logit of magnitude L is off by about
# L * 2^-24, and the tests draw logits up to about 30. Tensor cores cut sums off instead of rounding them.
HEADWISE_SCORES: Tolerance = {"rtol": 1e-5, "atol": 1e-9}

# Attention weights of vision layers: the rows that they are made of went through other attention kernels before.
ATTENTION: Tolerance = {"rtol": 1e-4, "atol": 1e-6}

# Sums of up to 3000 products of normal numbers, themselves up to about 250, in float32 against float64; the other
# dtypes are also off by one unit of their last place.
LINEAR: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}

# As above, by dtype of the result: float32 is off by up to about 30 * 2^-24 of the largest value, itself about 4; the
# others also by one unit of their last place, where the two sides round to different neighbours.
PAGED_ATTENTION: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}

# As above; bfloat16 queries become int16 beside int8 keys: each element is off by up to 2^-16 of its head's largest,
# about 12, in logits of up to 128 products with a standard deviation of 4.
INT8_PAGES: dict[torch.dtype, Tolerance] = {
    **PAGED_ATTENTION,
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-4},
}

# As PAGED_ATTENTION; machines that multiply pairs of bfloat16 also round each weight to it, which takes up to 2^-9 of
# each of the values, themselves up to about 4, that a row adds up.
MANY_ROWS_ATTENTION: dict[torch.dtype, Tolerance] = {
    **PAGED_ATTENTION,
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
}

# One unit of the last place, and another where both sides round to different neighbours; a gate of magnitude G is off
# by about G * 2^-24 more, through its exponential.
SILU_GATE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 1e-5},
    torch.float16: {"rtol": 2**-9, "atol": 1e-5},
}

# Hidden states of up to about 40, and pages, after six layers. Both sides round at the same places; where a bfloat16
# value rounds to different neighbours, the later layers carry that on; one unit of the last place of 40 is 0.25. A
# wrong layer is off by 1 and more.
DECODE_LAYERS: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2**-7, "atol": 0.25},
}

# Logits in float32 with a standard deviation of 1 to 4, through up to 7 layers: rounding of different matmul
# shapes and of another attention kernel, about 1e-5. A wrong mask moves them by 0.1 and more.
LOGITS = 1e-4

# Share of the logits' standard deviation that rounding weights and activations to bfloat16 may take.
LOGITS_BFLOAT16 = 0.1

# The same of int8 weights: half of a 127th of a row's largest at most, 1 % of the weights' own standard deviation.
LOGITS_INT8 = 0.1

# The same of int4: a sixteenth of a group's largest at most, 10 % of the weights' own standard deviation.
LOGITS_INT4 = 0.5

# As LINEAR, for quantized weights. A few bfloat16 rows are multiplied as 16-bit integers: what is smaller than 2^-7 of
# a group's largest, itself about 4, is off by 2^-15 of it, in sums of up to 4100 such products.
LINEAR_QUANTIZED: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-4},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-3},
    torch.float16: {"rtol": 2**-10, "atol": 3e-4},
}

# A GPU's product of rows and int8 weights, by dtype of the rows: others than float32 are rounded to bfloat16, and so is
# the sum before it is scaled.
PRODUCT_OF_A_GPU: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 0.1},
    torch.float16: {"rtol": 2**-6, "atol": 0.1},
}
