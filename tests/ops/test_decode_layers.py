"""decode_layers: steps by hand, equality with the reference, edges, refusals, and how long weights live."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import nan
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import DECODE_LAYERS
from trimserve.model.int4 import to_int4
from trimserve.ops import PAGE_POSITIONS, CrossTables, DecoderLayers, SelfTables, decode_layers, reference

Op = Callable[..., None]
D, HEADS, HEAD_DIM, MLP = 24, 4, 6, 10
FORMS = ["floats", "int8", "int4", "mixed"]
NUM_PAGES, NUM_TEXT_PAGES = 48, 36


class Step(NamedTuple):
    """Arguments of `decode_layers`."""

    layers: DecoderLayers
    hidden: Tensor
    pages: Tensor
    angles: tuple[Tensor, Tensor]
    text: SelfTables
    features: CrossTables | None

    def copy(self) -> "Step":
        return self._replace(hidden=self.hidden.clone(), pages=self.pages.clone())


class Draw:
    """Random layers and steps from one seed."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, num_kv_heads: int = 2, seed: int = 0, head_dim: int = HEAD_DIM
    ) -> None:
        """Start a sequence of random numbers."""
        self._dtype, self._num_kv_heads, self._head_dim = dtype, num_kv_heads, head_dim
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self._generator)

    def layers(self, kinds: str = "ssxssx", form: str = "floats") -> DecoderLayers:
        """Self- (s) and cross-attention (x) layers; "mixed" has linear layers of every form."""
        queries, keys_values = HEADS * self._head_dim, 2 * self._num_kv_heads * self._head_dim
        weights, scales = [], []
        for kind in kinds:
            attention = [(D,), (queries + keys_values, D)] if kind == "s" else [(D,), (queries, D), (self._head_dim,)]
            for shape in [*attention, (D, queries), (D,), (2 * MLP, D), (D, MLP)]:
                if len(shape) == 1:
                    weights.append((1 + self.normal(*shape) / 4).to(self._dtype))
                else:
                    weight, of_weight = self._linear(
                        shape[0], shape[1], FORMS[len(weights) % 3] if form == "mixed" else form
                    )
                    weights.append(weight)
                    scales.append(of_weight)
        scales = [] if form == "floats" else scales
        cross = [index for index, kind in enumerate(kinds) if kind == "x"]
        return DecoderLayers(weights, scales, cross, [0.7, -0.4] * len(cross), 1e-5)

    def _linear(self, num_outputs: int, num_inputs: int, form: str) -> tuple[Tensor, Tensor]:
        """Weight, and scales or an empty tensor."""
        exact = self.normal(num_outputs, num_inputs) / num_inputs**0.5
        if form == "floats":
            return exact.to(self._dtype), torch.empty(0)
        if form == "int8":
            weight = (self.integers(255, num_outputs, num_inputs) - 127).to(torch.int8)
            return weight, self.normal(num_outputs).abs() / 70 / num_inputs**0.5
        return to_int4(exact, 32)

    def step(
        self, layers: DecoderLayers, num_rows: int, *, num_seeing: tuple[int, ...] = (), has_bias: bool = False
    ) -> Step:
        """Pages of two layers, full of numbers; rows of up to three pages of text, and of features where they see."""
        shape = (NUM_PAGES, 2, 2, self._num_kv_heads, PAGE_POSITIONS, self._head_dim)
        pages, angles = self.normal(*shape).to(self._dtype), self.normal(num_rows, self._head_dim // 2) * 3
        ids = torch.randperm(NUM_TEXT_PAGES, generator=self._generator).int()
        tables = ids[: 2 * num_rows * 3].view(2, num_rows, 3)
        lengths = self.integers(3 * PAGE_POSITIONS, num_rows).int() + 1
        last = lengths.long() - 1
        slots = tables.long().gather(2, (last // PAGE_POSITIONS).expand(2, -1)[..., None])[..., 0]
        text = SelfTables(tables, lengths, slots * PAGE_POSITIONS + last % PAGE_POSITIONS)
        features = CrossTables(
            [NUM_TEXT_PAGES + self.integers(NUM_PAGES - NUM_TEXT_PAGES, rows, 2).int() for rows in num_seeing],
            [self.integers(2 * PAGE_POSITIONS, rows).int() + 1 for rows in num_seeing],
            [self.normal(rows, 2 * PAGE_POSITIONS) for rows in num_seeing] if has_bias else (),
        )
        hidden = self.normal(num_rows, D).to(self._dtype)
        return Step(layers, hidden, pages, (angles.cos(), angles.sin()), text, features if num_seeing else None)


def assert_equals_reference(step: Step) -> None:
    expected = step.copy()
    reference.decode_layers(*expected)
    decode_layers(*step)
    tolerance = DECODE_LAYERS[step.hidden.dtype]
    torch.testing.assert_close(step.hidden, expected.hidden, **tolerance)
    torch.testing.assert_close(step.pages, expected.pages, **tolerance)


NO_MLP = [torch.ones(2), torch.zeros(2, 2), torch.zeros(2, 1)]


@pytest.mark.parametrize("op", [decode_layers, reference.decode_layers])
def test_a_new_row_attends_to_itself_and_what_was_there(op: Op) -> None:
    # One head of size 2. Queries are 0, so both positions weigh the same; keys and values are the normed row.
    qkv = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    layers = DecoderLayers([torch.ones(2), qkv, torch.eye(2), *NO_MLP], [], [], [], 0.0)
    pages = torch.full((2, 1, 2, 1, PAGE_POSITIONS, 2), nan)
    pages[1, 0, :, 0, 0] = torch.tensor([5.0, 7.0])
    hidden = torch.tensor([[3.0, 3.0]])
    text = SelfTables(torch.tensor([[[1]]]).int(), torch.tensor([2]).int(), torch.tensor([[PAGE_POSITIONS + 1]]))
    op(layers, hidden, pages, (torch.tensor([[0.0]]), torch.tensor([[1.0]])), text)
    torch.testing.assert_close(pages[1, 0, 0, 0, 1], torch.tensor([-1.0, 1.0]))  # a quarter turn of the normed row
    torch.testing.assert_close(pages[1, 0, 1, 0, 1], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(hidden, torch.tensor([[6.0, 7.0]]))  # added: the mean of (5, 7) and (1, 1)


@pytest.mark.parametrize("op", [decode_layers, reference.decode_layers])
def test_gates_weigh_attention_and_mlp_of_rows_that_see_features(op: Op) -> None:
    # The keys of both features are equal, so attention gives the mean of their values, (4, 8). The normed row is then
    # (1, 1): the MLP has gate 100 and up 2, and gives 200 to the first element.
    gate_up = torch.tensor([[50.0, 50.0], [1.0, 1.0]])
    query = [torch.ones(2), torch.eye(2), torch.ones(2), torch.eye(2)]
    mlp = [torch.ones(2), gate_up, torch.tensor([[1.0], [0.0]])]
    pages = torch.zeros(1, 1, 2, 1, PAGE_POSITIONS, 2)
    pages[0, 0, 1, 0, :2] = torch.tensor([[3.0, 6.0], [5.0, 10.0]])
    hidden = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    features = CrossTables([torch.tensor([[0]]).int()], [torch.tensor([2]).int()])
    no_text = SelfTables(torch.zeros(0, 2, 1).int(), torch.zeros(2).int(), torch.zeros(0, 2).long())
    layers = DecoderLayers([*query, *mlp], [], [0], [0.5, 0.0], 0.0)
    op(layers, hidden, pages, (torch.ones(2, 1), torch.ones(2, 1)), no_text, features)
    torch.testing.assert_close(hidden, torch.tensor([[3.0, 3.0], [1.0, -1.0]]))
    gated = DecoderLayers([*query, *mlp], [], [0], [0.5, 0.25], 0.0)
    hidden = torch.tensor([[1.0, -1.0]])
    op(gated, hidden, pages, (torch.ones(1, 1), torch.ones(1, 1)), no_text, features)
    torch.testing.assert_close(hidden, torch.tensor([[53.0, 3.0]]))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20)
@given(
    num_rows=st.integers(0, 6),
    seeing=st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6)),
    has_bias=st.booleans(),
    kinds=st.sampled_from(["ssxssx", "xxssss", "sxxs"]),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(
    dtype: torch.dtype,
    form: str,
    num_kv_heads: int,
    num_rows: int,
    seeing: tuple[int, int] | None,
    has_bias: bool,
    kinds: str,
    seed: int,
) -> None:
    draw = Draw(dtype, num_kv_heads, seed, head_dim=HEAD_DIM if form in FORMS[:2] else 8)  # int4 has units of 32 inputs
    num_seeing = tuple(min(rows, num_rows) for rows in seeing or ())
    layers = draw.layers(kinds, form)
    assert_equals_reference(draw.step(layers, num_rows, num_seeing=num_seeing, has_bias=has_bias))


@pytest.mark.parametrize("kinds", ["s", "x"])
def test_equals_reference_where_all_layers_are_of_one_kind(kinds: str) -> None:
    draw = Draw()
    assert_equals_reference(draw.step(draw.layers(kinds), 3, num_seeing=(2,) if kinds == "x" else ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_last_bit_in_every_batch(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    step = draw.step(draw.layers(), 5, num_seeing=(5, 5))
    for row in range(5):
        alone, one = step.copy(), slice(row, row + 1)
        assert step.features is not None
        decode_layers(
            alone.layers,
            hidden := alone.hidden[one].clone(),
            alone.pages,
            (step.angles[0][one], step.angles[1][one]),
            SelfTables(step.text.tables[:, one], step.text.lengths[one], step.text.slots[:, one]),
            CrossTables([x[one] for x in step.features.tables], [x[one] for x in step.features.lengths]),
        )
        together = step.copy()
        decode_layers(*together)
        assert torch.equal(hidden, together.hidden[one])


def test_a_row_that_sees_no_features_passes_cross_attention_unchanged() -> None:
    draw = Draw()
    step = draw.step(draw.layers("xx"), 3, num_seeing=(2, 1))
    before = step.hidden.clone()
    decode_layers(*step)
    assert torch.equal(step.hidden[2], before[2])
    assert not torch.equal(step.hidden[1], before[1])


def test_layers_of_several_models_live_side_by_side() -> None:
    draw = Draw()
    one, other = draw.layers(), draw.layers()
    step = draw.step(one, 2)
    expected = step.copy()
    decode_layers(*expected)
    decode_layers(*step.copy()._replace(layers=other))
    del other
    gc.collect()
    decode_layers(*step)
    assert torch.equal(step.hidden, expected.hidden)


def test_released_layers_give_back_their_handle_and_their_weights() -> None:
    weights = [torch.ones(2), torch.ones(6, 2), torch.ones(2, 2), *(weight.clone() for weight in NO_MLP)]
    layers = DecoderLayers(weights, [], [], [], 0.0)
    alive, handle = weakref.ref(weights[1]), layers.handle
    hidden, pages = torch.ones(1, 2), torch.ones(1, 1, 2, 1, PAGE_POSITIONS, 2)
    del weights, layers
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match=f"layers must be a handle of DecoderLayers that still exists, got {handle}$"):
        torch.ops.trimserve.decode_layers(hidden, pages, handle, [], [], [], [], [])
    with pytest.raises(ValueError, match=f"drop_decoder_layers: layers must be a handle .* got {handle}$"):
        torch.ops.trimserve.drop_decoder_layers(handle)


def test_threads_make_use_and_release_layers_side_by_side() -> None:
    def run(seed: int) -> list[bool]:
        draw = Draw(seed=seed)
        step = draw.step(draw.layers("sx"), 2, num_seeing=(1,))
        expected = step.copy()
        decode_layers(*expected)
        weights = (step.layers.weights, (), step.layers.cross_layers, step.layers.gates, step.layers.epsilon)
        found = []
        for _ in range(50):
            again = step.copy()._replace(layers=DecoderLayers(*weights))
            decode_layers(*again)
            found.append(torch.equal(again.hidden, expected.hidden))
        return found

    with ThreadPoolExecutor(4) as threads:
        assert all(all(found) for found in threads.map(run, range(4)))


def test_a_handle_is_never_used_twice() -> None:
    draw = Draw()
    handles = [draw.layers("s").handle for _ in range(3)]
    assert len({*handles}) == 3


@pytest.mark.parametrize("handle", [0, -1, 2**62])
def test_a_handle_that_was_never_given_is_refused(handle: int) -> None:
    step = Draw().step(Draw().layers(), 1)
    with pytest.raises(ValueError, match=f"decode_layers: layers must be a handle .* got {handle}$"):
        torch.ops.trimserve.decode_layers(step.hidden, step.pages, handle, step.angles, step.text, [], [], [])


def test_tables_are_checked_in_every_step() -> None:
    draw = Draw()
    step = draw.step(draw.layers(), 2)
    decode_layers(*step.copy())
    step.text.tables[0, 0, 0] = NUM_PAGES
    with pytest.raises(ValueError, match=rf"paged_attention: tables\[0, 0\] must be in \[0, {NUM_PAGES}\), got 48"):
        decode_layers(*step)


def layer_arguments(*, form: str = "int8") -> dict[str, Any]:
    layers = Draw().layers("sx", form)
    names = ("weights", "scales", "cross_layers", "gates")
    return {name: list(getattr(layers, name)) for name in names} | {"epsilon": layers.epsilon}


def changed(name: str, index: int, value: Tensor, *, form: str = "int8") -> dict[str, Any]:
    arguments = layer_arguments(form=form)
    arguments[name][index] = value
    return arguments


BYTES = torch.int8
INT4 = torch.ones(48, 16, dtype=torch.uint8)
BAD_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"weights": layer_arguments()["weights"][:-1]}, "weights must be six of each self-attention layer .* got 12"),
    ({"weights": [], "scales": [], "cross_layers": [], "gates": []}, "weights must be six of each .* got 0"),
    ({"scales": [torch.ones(4)]}, "scales must be four of each of 2 layers, or none, got 1"),
    (
        changed("scales", 0, torch.ones(2, 2)),
        r"scales of query-key-value of layer 0 .* int8 weight, got .* \[2, 2\]",
    ),
    (changed("scales", 0, torch.ones(48, device="meta")), "scales of query-key-value of layer 0 must be on cpu, got a"),
    (changed("scales", 0, torch.empty(0)), r"query-key-value of layer 0 must be float32 \[any, 24\] .* got int8"),
    (
        changed("weights", 1, INT4),
        r"scales of query-key-value of layer 0 .* \[48, groups\] .* got .* \[48\]",
    ),
    ({"gates": [0.5]}, "gates must be two of each of 1 cross-attention layers, got 1"),
    ({"cross_layers": [2]}, r"cross_layers must ascend within \[0, 2\), got 2 at 0"),
    ({"cross_layers": [-1]}, r"cross_layers must ascend within \[0, 2\), got -1 at 0"),
    ({"cross_layers": [0]}, r"query norm of layer 0 must be float32 \[any\] on cpu, got int8 \[24, 24\]"),
    ({"epsilon": -1.0}, "epsilon must be finite and at least 0, got -1"),
    ({"epsilon": nan}, "epsilon must be finite and at least 0, got nan"),
    (changed("weights", 0, torch.ones(D, dtype=torch.int32)), r"input norm of layer 0 must be .* got int32 \[24\]"),
    (changed("weights", 0, torch.ones(0)), r"input norm of layer 0 must be .* got float32 \[0\]"),
    (changed("weights", 0, torch.ones(D - 1)), r"query-key-value of layer 0 must be int8 \[any, 23\]"),
    (changed("weights", 1, torch.ones(48, D)), r"query-key-value of layer 0 must be int8 \[any, 24\] .* got float32"),
    (changed("weights", 1, torch.ones(D, 48, dtype=BYTES).T), "query-key-value of layer 0 must be contiguous"),
    (changed("weights", 1, torch.ones(24, D), form="floats"), "query-key-value of layer 0 must have 24 outputs for"),
    (changed("weights", 2, torch.ones(D - 1, 24, dtype=BYTES)), r"output of layer 0 must be int8 \[24, any\]"),
    (changed("weights", 3, torch.ones(D).half()), r"MLP norm of layer 0 must be float32 \[24\] on cpu, got float16"),
    (changed("weights", 4, torch.ones(5, D), form="floats"), "gate-up of layer 0 must have an even number of outputs"),
    (changed("weights", 1, torch.ones(48, D).half(), form="floats"), "query-key-value of layer 0 must be float32"),
    (changed("weights", 5, torch.ones(D, 4, dtype=BYTES)), r"down of layer 0 must be int8 \[24, 10\] on cpu, got int8"),
    (changed("weights", 7, torch.ones(12, D, dtype=BYTES)), r"query of layer 1 must be int8 \[24, 24\] on cpu"),
    (changed("weights", 8, torch.ones(5)), "query of layer 1 must have a multiple of Dh=5 outputs, got 24"),
    (changed("weights", 8, torch.ones(6, device="meta")), "query norm of layer 1 .* on a device that is neither"),
    (changed("scales", 3, torch.ones(3)), r"scales of down of layer 0 must be float32 \[24\] of an int8 .* \[3\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_LAYERS)
def test_layers_that_do_not_fit_are_refused_when_they_are_described(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="DecoderLayers: (.*)" + message):
        DecoderLayers(**(layer_arguments() | changes))


def step_arguments() -> Step:
    draw = Draw()
    return draw.step(draw.layers("sx"), 2, num_seeing=(1,), has_bias=True)


GIVEN = step_arguments()
assert GIVEN.features is not None
INTS = torch.ones(1, dtype=torch.int32)
BAD_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"pages": torch.zeros(3, 1, 2, 2, PAGE_POSITIONS, 0)}, "Dh must be at least 1, got 0"),
    ({"pages": torch.zeros(3, 1, 2, 2, 8, HEAD_DIM)}, "pages must be float32, bfloat16 or float16"),
    ({"pages": GIVEN.pages.half()}, "pages must be float32 like the layers, or int8, got float16"),
    ({"pages": GIVEN.pages[:, :, :, :1].contiguous()}, r"pages must have .* Hkv \* Dh=12 .* got Hkv=1, Dh=6"),
    ({"pages": torch.zeros(3, 2, 2, 4, PAGE_POSITIONS, 3)}, "pages must have .* got Hkv=4, Dh=3"),
    ({"hidden": torch.ones(2, 1, D)}, r"hidden must be contiguous float32 \[B, 24\], got float32 \[2, 1, 24\]"),
    ({"hidden": torch.ones(2, D - 1)}, r"hidden must be contiguous .* got float32 \[2, 23\]"),
    ({"hidden": torch.ones(D, 2).T}, "hidden must be contiguous"),
    ({"hidden": GIVEN.hidden.half()}, "hidden must be contiguous float32 .* got float16"),
    ({"angles": (torch.ones(2, 2), torch.ones(2, 2))}, r"rotate_write_kv: cosines must be float32 \[2, 3\]"),
    ({"angles": GIVEN.angles[:1]}, "angles must be cosines and sines, got 1 tensors"),
    ({"text": GIVEN.text[:2]}, "text must be tables, lengths and slots, got 2 tensors"),
    ({"text": GIVEN.text._replace(tables=GIVEN.text.tables[:0])}, "text.tables must have 3 dimensions, .* 1 groups"),
    ({"text": GIVEN.text._replace(slots=GIVEN.text.slots[0])}, r"text.slots must have 2 dimensions, .* int64 \[2\]"),
    ({"text": GIVEN.text._replace(lengths=INTS)}, "lengths must have B=2 entries like q, got 1"),
    ({"features": GIVEN.features._replace(tables=[INTS])}, r"tables must be int32 \[B, max_pages\]"),
    ({"features": GIVEN.features._replace(lengths=[INTS[0]])}, r"features.lengths must be int32 \[S\]"),
    ({"features": GIVEN.features._replace(lengths=[INTS.repeat(3)])}, "features.lengths must be .* S at most B=2, got"),
    ({"features": GIVEN.features._replace(lengths=[])}, "features.tables must be as many as features.lengths=0, got 1"),
    ({"features": GIVEN.features._replace(lengths=[INTS] * 2)}, "features.lengths must be one of each of 1 cross"),
    ({"features": GIVEN.features._replace(biases=[INTS] * 2)}, "features.biases must be .* or none, got 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STEPS)
def test_steps_that_do_not_fit_the_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_layers(*step_arguments()._replace(**changes))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    draw = Draw(head_dim=8)
    step = draw.step(draw.layers(form=form), 3, num_seeing=(2, 1), has_bias=True)
    assert step.features is not None
    lists = [[*tensors] for tensors in (step.angles, step.text, *step.features)]
    arguments = (step.hidden, step.pages, step.layers.handle, *lists)
    torch.library.opcheck(torch.ops.trimserve.decode_layers.default, arguments)
