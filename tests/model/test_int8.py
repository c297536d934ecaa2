"""Weight-only int8: rounding by hand."""

import pytest
import torch

from trimserve import ops
from trimserve.model.int8 import to_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_largest_magnitude_of_a_row_becomes_127() -> None:
    weights, scales = to_int8(torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.126]]))
    assert weights.tolist() == [[127, -1, 0], [0, 0, 0], [-127, 64, 32]]
    torch.testing.assert_close(scales[[0, 2]], torch.tensor([1.0, 0.5 / 127]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    exact = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, scales = to_int8(exact)
    assert ((weights * scales[:, None] - exact.float()).abs() <= 0.5001 * scales[:, None]).all()


def test_weights_that_are_not_finite_do_not_pass_for_numbers() -> None:
    weights, scales = to_int8(torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 1.0]]))
    assert ops.linear(torch.ones(1, 2), weights, scales).isfinite().tolist() == [[False, False, True]]
