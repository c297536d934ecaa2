"""Weight-only int4: packing and rounding by hand, and unpacking beside its definition."""

import pytest
import torch

from trimserve.model.int4 import pack_int4, to_int4, unpack_int4
from trimserve.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_byte_i_of_16_holds_inputs_i_and_i_plus_16_plus_8() -> None:
    weights = torch.zeros(1, 34, dtype=torch.int8)
    weights[0, 0], weights[0, 16], weights[0, 3], weights[0, 33] = -8, 7, -1, 5
    packed = pack_int4(weights)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0xF0, 0x88, 0x88, 0x87, *[0x88] * 12, 0x88, 0x8D, *[0x88] * 14]]


@pytest.mark.parametrize("num_inputs", [1, 31, 32, 33, 64, 100, 300])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_back_what_was_packed(dtype: torch.dtype, group: int, num_inputs: int) -> None:
    generator = torch.Generator().manual_seed(num_inputs)
    weights = torch.randint(-8, 8, (5, num_inputs), generator=generator)
    scales = torch.randn(5, -(-num_inputs // group), generator=generator).to(dtype)
    expected = torch.stack([weights[:, i] * scales[:, i // group].double() for i in range(num_inputs)], dim=1)
    packed = pack_int4(weights)
    assert torch.equal(reference.unpack_int4(packed, scales, num_inputs), expected)
    torch.testing.assert_close(unpack_int4(packed, scales, num_inputs).double(), expected, rtol=1e-7, atol=0)


def test_the_largest_magnitude_of_a_group_becomes_minus_8() -> None:
    rows = torch.zeros(2, 96)
    rows[0, :3], rows[0, 64:66] = torch.tensor([-4.0, 3.9, 0.3]), torch.tensor([16.0, -2.0])
    weights, scales = to_int4(rows, 64)
    assert scales.tolist() == [[0.5, -2.0], [0.0, 0.0]]
    exact = reference.unpack_int4(weights, scales, 96)
    assert exact[0, :3].tolist() == [-4.0, 3.5, 0.5]
    assert exact[0, 64:66].tolist() == [16.0, -2.0]
    assert exact.abs().sum() == 4.0 + 3.5 + 0.5 + 16.0 + 2.0


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_off_by_a_scale_at_most(dtype: torch.dtype, group: int) -> None:
    exact = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, scales = to_int4(exact, group)
    off = (reference.unpack_int4(weights, scales, 200) - exact.double()).abs()
    bound = scales.double().abs().repeat_interleave(group, dim=1)[:, :200]
    assert (off <= 1.05 * bound).all()  # where the largest positive is nearly as large as the largest negative
    assert (off <= 0.5001 * bound).double().mean() > 0.9


def test_weights_that_are_not_finite_do_not_pass_for_numbers() -> None:
    rows = torch.ones(3, 64)
    rows[0, 5], rows[1, 5] = torch.nan, torch.inf
    weights, scales = to_int4(rows)
    is_finite = reference.unpack_int4(weights, scales, 64).isfinite().all(dim=1)
    assert is_finite.tolist() == [False, False, True]
