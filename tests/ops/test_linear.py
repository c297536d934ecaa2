"""linear: a table by hand, equality with the reference, independence of the batch, edges, refusals."""

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.arrays import LAYOUTS, misaligned, threads
from tests.ops.refusals import assert_refused
from tests.tolerances import LINEAR, LINEAR_QUANTIZED
from trimserve.ops import layers, linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = [linear, layers._linear_of_torch]  # the latter is what CUDA runs, which has no int4
FORMS = ["floats", "int8", "int4"]
OPS_AND_FORMS = [*((linear, form) for form in FORMS), *((OPS[1], form) for form in FORMS[:2])]
GROUPS = [32, 64, 128]
Inputs = tuple[Tensor, Tensor, Tensor | None]


def draw(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype = torch.float32,
    form: str = "floats",
    seed: int = 0,
    *,
    group: int = 64,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """Random rows and weight; the latter int8 or int4 with scales, or of the rows' dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    if form == "floats":
        return x, torch.randn(num_outputs, num_inputs, generator=generator).to(dtype), None
    if form == "int8":
        weight = torch.randint(-128, 128, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
        return x, weight, torch.rand(num_outputs, generator=generator) / 127
    packed = torch.randint(0, 256, (num_outputs, 16 * -(-num_inputs // 32)), generator=generator, dtype=torch.uint8)
    scales = torch.randn(num_outputs, -(-num_inputs // group), generator=generator) / 7
    return x, packed, scales.to(scale_dtype)


def assert_equals_reference(inputs: Inputs, op: Callable[..., Tensor] = linear) -> None:
    tolerance = LINEAR if inputs[2] is None else LINEAR_QUANTIZED
    torch.testing.assert_close(op(*inputs), reference.linear(*inputs), **tolerance[inputs[0].dtype])


@pytest.mark.parametrize("op", [*OPS, reference.linear])
def test_rows_are_multiplied_with_every_row_of_the_weight(op: Callable[..., Tensor]) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1, 0, 0], [0, 1, 2]])
    assert op(x, weight.float()).tolist() == [[1, 8], [0, 0]]
    assert op(x, weight.to(torch.int8), torch.tensor([10.0, 0.5])).tolist() == [[10, 4], [0, 0]]


@pytest.mark.parametrize(("op", "form"), OPS_AND_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_products_without_inputs_are_0(op: Callable[..., Tensor], num_rows: int, dtype: torch.dtype, form: str) -> None:
    assert torch.equal(op(*draw(num_rows, 5, 0, dtype, form)), torch.zeros(num_rows, 5, dtype=dtype))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_int4_sums_keep_their_accuracy_where_inputs_have_a_mean(num_rows: int) -> None:
    x, weight, scales = draw(num_rows, 32, 8192, form="int4")
    assert scales is not None
    x += 1
    exact = reference.linear(x.double(), weight, scales)
    terms = x.double().square() @ reference.unpack_int4(weight, scales, 8192).square().T
    assert float(((linear(x, weight, scales) - exact).abs() / terms.sqrt()).median()) < 1e-6


@pytest.mark.parametrize("op", [linear, reference.linear])
def test_halves_of_bytes_are_weights_plus_8_times_the_scale_of_their_group(op: Callable[..., Tensor]) -> None:
    x = torch.zeros(2, 34)
    x[0, 0], x[0, 16], x[0, 17] = 1, 10, 100  # low half of byte 0, high halves of bytes 0 and 1
    x[1, 2], x[1, 32], x[1, 33] = 1, 10, 100  # low halves of byte 2 and of the next 16 bytes
    weight = torch.full((1, 32), 0x88, dtype=torch.uint8)  # all weights are 0
    weight[0, 0], weight[0, 1], weight[0, 2] = 0xF9, 0x08, 0x80  # 7 and 1; -8 and 0; 0 and -8
    weight[0, 16], weight[0, 17] = 0xFA, 0x0B  # 2 and 3; what their high halves say means nothing
    scales = torch.tensor([[2.0, 0.5]])
    expected = [[2 * (1 + 70 - 800)], [2 * -8 + 0.5 * (20 + 300)]]
    for dtype in DTYPES:
        assert op(x, weight, scales.to(dtype)).tolist() == expected


@pytest.mark.parametrize(("op", "form"), OPS_AND_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 288, 192), (16, 1024, 192), (70, 33, 200), (9, 640, 3000)])
def test_equals_reference(
    op: Callable[..., Tensor], rows: int, outputs: int, inputs: int, dtype: torch.dtype, form: str
) -> None:
    assert_equals_reference(draw(rows, outputs, inputs, dtype, form), op)


@pytest.mark.parametrize(("op", "form"), OPS_AND_FORMS)
@given(
    num_rows=st.integers(0, 70),
    num_outputs=st.integers(0, 40),
    num_inputs=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from(GROUPS),
    scale_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_equals_reference_on_any_shape(
    op: Callable[..., Tensor],
    form: str,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    group: int,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    inputs = draw(num_rows, num_outputs, num_inputs, dtype, form, seed, group=group, scale_dtype=scale_dtype)
    assert_equals_reference(inputs, op)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [4096, 4100])  # whole parts of one row, and more
def test_equals_reference_from_1_to_65_rows(num_inputs: int, dtype: torch.dtype, form: str) -> None:
    x, weight, scales = draw(65, 18, num_inputs, dtype, form)
    expected = reference.linear(x, weight, scales)
    for num_rows in range(1, 66):
        product = linear(x[:num_rows], weight, scales)
        torch.testing.assert_close(
            product, expected[:num_rows], **(LINEAR_QUANTIZED if scales is not None else LINEAR)[dtype]
        )


def test_int4_is_not_for_cuda() -> None:
    with pytest.raises(ValueError, match=r"^linear: int4 weights are for the CPU$"):
        layers._linear_of_torch(*draw(2, 4, 64, form="int4"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_last_bit_in_every_batch_and_on_every_thread(dtype: torch.dtype, form: str) -> None:
    x, weight, scales = draw(270, 1100, 1500, dtype, form)
    together = linear(x, weight, scales)
    assert_equals_reference((x, weight, scales))
    most = 48 if form == "floats" else 15  # rows from which on there is another order of sums
    few = linear(x[:most], weight, scales)
    for end in (1, 2, 3, 4, 5, 8, 13, most - 1):
        assert torch.equal(linear(x[:end], weight, scales), few[:end])
    for end in (most + 1, most + 2, 257):
        assert torch.equal(linear(x[:end], weight, scales), together[:end])
    with threads(3):
        assert torch.equal(linear(x, weight, scales), together)
        for end in (1, 15, most):
            assert torch.equal(linear(x[:end], weight, scales), few[:end])


def test_threads_that_help_each_other_compute_every_output() -> None:
    x, weight, scales = draw(1, 70_000, 1024, torch.bfloat16, "int8")  # several MiB for each of three threads
    alone = linear(x, weight, scales)
    with threads(3):
        found = [linear(x, weight, scales) for _ in range(5)]  # all kept, so that none lies where another was
    assert all(torch.equal(output, alone) for output in found)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num_inputs", [16384, 16416, 28672, 65536])
def test_a_row_alone_is_as_in_a_tile_however_many_groups_of_int4_it_passes(num_inputs: int, group: int) -> None:
    x, weight, scales = draw(2, 16, num_inputs, torch.bfloat16, "int4", group=group)
    assert torch.equal(linear(x[:1], weight, scales), linear(x, weight, scales)[:1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_rows_does_not_matter(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, form: str) -> None:
    for num_rows in (6, 18):
        x, weight, scales = draw(num_rows, 20, 40, dtype, form)
        assert torch.equal(linear(layout(x), weight, scales), linear(x, weight, scales))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [5, 18])
def test_reads_nothing_beside_its_arguments(num_rows: int, dtype: torch.dtype, form: str) -> None:
    x, weight, scales = draw(num_rows, 20, 37, dtype, form)
    expected = linear(x, weight, scales)
    for offset in range(18):
        rows = misaligned(x, offset, nan)[0]
        columns = misaligned(weight, offset, {"floats": nan, "int8": 127, "int4": 255}[form])[0]
        assert torch.equal(linear(rows, columns, scales), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [6, 18])
def test_what_is_not_finite_stays_in_its_row_and_output(num_rows: int, dtype: torch.dtype) -> None:
    x, weight, _ = draw(num_rows, 20, 40, dtype)
    x[1, 3], weight[7, 0] = nan, inf
    is_finite = torch.ones(num_rows, 20, dtype=torch.bool)
    is_finite[1], is_finite[:, 7] = False, False
    assert torch.equal(linear(x, weight).isfinite(), is_finite)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [6, 18])
def test_what_is_not_finite_stays_in_its_row_and_quantized_output(
    num_rows: int, dtype: torch.dtype, form: str, bad: float
) -> None:
    x, weight, scales = draw(num_rows, 20, 140, dtype, form)
    assert scales is not None
    x[1, 3] = x[4, 139] = bad
    scales[7] = nan
    is_finite = torch.ones(num_rows, 20, dtype=torch.bool)
    is_finite[[1, 4]], is_finite[:, 7] = False, False
    weight[:, 3], weight[:, 139 if form == "int8" else 75] = 1, 1  # not 0, which infinity makes NaN, either
    assert torch.equal(linear(x, weight, scales).isfinite(), is_finite)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 110])
def test_inputs_of_any_size_are_multiplied_with_quantized_weights(exponent: int, form: str) -> None:
    x, weight, scales = draw(3, 10, 200, torch.bfloat16, form)
    x[:, ::7] = 0
    product = linear(x, weight, scales)
    assert torch.equal(linear(x * 2.0**exponent, weight, scales), product * 2.0**exponent) or exponent < -90
    assert linear(x * 2.0**exponent, weight, scales).isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("num_inputs", [256, 250])
@pytest.mark.parametrize("group", [0, *GROUPS])  # 0: int8
def test_sums_of_small_integers_are_exact_where_rows_are_bfloat16(group: int, num_inputs: int, num_rows: int) -> None:
    form = "int4" if group else "int8"
    _, weight, scales = draw(1, 20, num_inputs, torch.bfloat16, form, group=group)
    assert scales is not None
    scales = torch.ones_like(scales)
    x = torch.randint(-255, 256, (num_rows, num_inputs), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::3], x[:, 1::5] = 255, -255  # the most of 8 bits
    expected = reference.linear(x, weight, scales)
    assert torch.equal(linear(x.bfloat16(), weight, scales), expected.bfloat16())


def test_a_bfloat16_input_that_is_larger_than_all_others_leaves_them_their_first_bits() -> None:
    x = torch.full((1, 128), 1.0, dtype=torch.bfloat16)
    x[0, 5] = 2.0**10
    weight = torch.ones(1, 128, dtype=torch.int8)
    assert linear(x, weight, torch.ones(1)).item() == 1024 + 128  # 1151, in bfloat16
    weight[0, 5] = 0
    assert linear(x, weight, torch.ones(1)).item() == 127


X, W, Q, S = torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int8), torch.zeros(3)
U, S4 = torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(3, 1)
OF_8 = "of an int4 weight, one for each 32, 64 or 128 of 8 inputs, got "
SCALES_OF_8 = f"scales must be float32, bfloat16 or float16 [3, groups] {OF_8}"
REFUSALS: list[tuple[Inputs, str]] = [
    ((X.double(), W, None), "x must be float32, bfloat16 or float16 [R, K], got float64 [5, 8]"),
    ((X[0], W, None), "x must be float32, bfloat16 or float16 [R, K], got float32 [8]"),
    ((X, W.half(), None), "weight must be float32 [N, K] like x, got float16 [3, 8]"),
    ((X, W[:, :7], None), "weight must be float32 [N, K] like x, got float32 [3, 7]"),
    ((X, W[0], None), "weight must be float32 [N, K] like x, got float32 [8]"),
    ((X[:, :7], torch.zeros(3, 8)[:, :7], None), "weight must be contiguous"),
    ((X, Q, None), "weight must be float32 [N, K] like x, got int8 [3, 8]"),
    ((X, W, S), "weight must be int8 [N, K] like x, got float32 [3, 8]"),
    ((X, Q, S.half()), "scales must be float32 [3] of an int8 weight, got float16 [3]"),
    ((X, Q, S[:2]), "scales must be float32 [3] of an int8 weight, got float32 [2]"),
    ((X, Q, S[None]), "scales must be float32 [3] of an int8 weight, got float32 [1, 3]"),
    ((X, U, None), "weight must be float32 [N, K] like x, got uint8 [3, 16]"),
    ((X, U[:, :15].contiguous(), S4), "weight must be uint8 [N, 16 * ceil(K / 32)] like x, got uint8 [3, 15]"),
    ((torch.zeros(5, 33), U, S4), "weight must be uint8 [N, 16 * ceil(K / 32)] like x, got uint8 [3, 16]"),
    ((X, U, S), SCALES_OF_8 + "float32 [3]"),
    ((X, U, S4[:2]), SCALES_OF_8 + "float32 [2, 1]"),
    ((X, U, torch.zeros(3, 2)), SCALES_OF_8 + "float32 [3, 2]"),
    ((X, U, S4.double()), SCALES_OF_8 + "float64 [3, 1]"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refuses_with_its_reason(arguments: Inputs, message: str) -> None:
    assert_refused(linear, arguments, message)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, form: str) -> None:
    torch.library.opcheck(torch.ops.trimserve.linear.default, draw(5, 20, 40, dtype, form))
