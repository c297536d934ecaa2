"""Quantized linear layers against what the libraries that wrote them make of them; `quantized/` has both.

`scripts/generate/quantized_fixtures.py` writes the files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.formats.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from trimserve.model.formats.table import quantized_linears
from trimserve.model.stored_tensors import stored_tensors

FIXTURES = sorted((Path(__file__).parent / "quantized").glob("*.safetensors"))
INT8 = {"bnb_int8", "w8a8", "w8a8_per_tensor"}
INT4 = {"auto_round", "gptq_symmetric", "w4a16"}


def config_of(fixture: Path) -> dict[str, Any]:
    """The `quantization_config` it was written with."""
    with safe_open(fixture, framework="pt") as content:
        config: dict[str, Any] = json.loads(content.metadata()["config"])
    return config


def layer_of(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> tuple[QuantizedLinear | None, Tensor]:
    """A layer read from its file, and what the library makes of it."""
    expected = tensors["expected"]
    save_file(tensors, folder / "model.safetensors")
    stored = stored_tensors(folder)
    layers, used = quantized_linears({"layer": (expected.shape[0], expected.shape[1])}, stored, config)
    assert stored.keys() - used <= {"expected", "layer.weight", "layer.bias"}
    return layers.get("layer"), expected


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_floats_equal_the_librarys_own_in_slices_of_any_size(fixture: Path, tmp_path: Path) -> None:
    layer, expected = layer_of(load_file(fixture), config_of(fixture), tmp_path)
    assert layer is not None
    for step in (1, 2, 3, 100):
        starts = range(0, len(expected), step * layer.row_multiple)
        slices = [slice(start, min(start + step * layer.row_multiple, len(expected))) for start in starts]
        floats = torch.cat([layer.floats(part) for part in slices])
        assert floats.dtype == expected.dtype
        assert torch.equal(floats, expected)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_int8_of_a_row_each_stays_as_it_is_stored(fixture: Path, tmp_path: Path) -> None:
    tensors = load_file(fixture)
    layer, expected = layer_of(tensors, config_of(fixture), tmp_path)
    assert isinstance(layer, Int8Linear) == (fixture.stem in INT8)
    if isinstance(layer, Int8Linear):
        numbers, scales = layer.int8(slice(3, 9))
        assert torch.equal(numbers, tensors["layer.weight"][3:9])
        assert scales.dtype == torch.float32
        assert scales.shape == (6,)
        exact = numbers * scales[:, None]
        torch.testing.assert_close(exact, expected[3:9].float(), rtol=torch.finfo(expected.dtype).eps, atol=0)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_int4_of_groups_without_zero_points_stays_as_it_is_stored(fixture: Path, tmp_path: Path) -> None:
    tensors = load_file(fixture)
    layer, expected = layer_of(tensors, config_of(fixture), tmp_path)
    assert isinstance(layer, Int4Linear) == (fixture.stem in INT4)
    if isinstance(layer, Int4Linear):
        numbers, scales = layer.int4(slice(8, 16))
        assert scales.dtype == layer.scale_dtype == expected.dtype
        assert scales.shape == (8, expected.shape[1] // layer.group_size)
        assert (int(numbers.min()), int(numbers.max())) == (-8, 7)
        exact = numbers.to(scales.dtype) * scales.repeat_interleave(layer.group_size, dim=1)
        assert torch.equal(exact, expected[8:16])


def test_groups_may_be_in_any_order_in_packed_weights(tmp_path: Path) -> None:
    fixture = next(file for file in FIXTURES if file.stem == "w4a16")
    tensors = load_file(fixture)
    groups = torch.arange(96, dtype=torch.int32) // 32
    tensors["layer.weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)  # none
    layer, expected = layer_of(tensors, config_of(fixture), tmp_path)
    assert layer is not None
    assert torch.equal(layer.floats(slice(0, 20)), expected)
    tensors["layer.weight_g_idx"] = groups.flip(0)
    layer, expected = layer_of(tensors, config_of(fixture), tmp_path)
    assert layer is not None
    scales = tensors["layer.weight_scale"]
    numbers = expected / scales[:, groups.long()]
    assert torch.equal(layer.floats(slice(0, 20)), numbers.round() * scales[:, groups.flip(0).long()])


@pytest.mark.parametrize("spelled", [{"format": "gptq_v2"}, {"checkpoint_format": "GPTQ_V2", "format": "gptq"}])
def test_gptqs_version_is_found_where_transformers_finds_it(spelled: dict[str, str], tmp_path: Path) -> None:
    fixture = next(file for file in FIXTURES if file.stem == "gptq_v2")
    config = {name: value for name, value in config_of(fixture).items() if not name.endswith("format")}
    layer, expected = layer_of(load_file(fixture), {**config, **spelled}, tmp_path)
    assert layer is not None
    assert torch.equal(layer.floats(slice(0, len(expected))), expected)


def test_an_unknown_version_of_gptq_is_refused(tmp_path: Path) -> None:
    fixture = next(file for file in FIXTURES if file.stem == "gptq_v2")
    with pytest.raises(CheckpointError, match="format of quantization_config must be gptq or gptq_v2, got marlin"):
        layer_of(load_file(fixture), {**config_of(fixture), "checkpoint_format": "marlin"}, tmp_path)


def test_a_layer_that_is_not_quantized_is_no_formats(tmp_path: Path) -> None:
    tensors = {"layer.weight": torch.ones(4, 8), "layer.bias": torch.ones(4), "expected": torch.ones(4, 8)}
    assert layer_of(tensors, {}, tmp_path)[0] is None


def test_scales_of_activations_are_of_no_account(tmp_path: Path) -> None:
    fixture = next(file for file in FIXTURES if file.stem == "fp8_per_tensor")
    tensors = {**load_file(fixture), "layer.input_scale": torch.ones(1), "attention.k_scale": torch.ones(1)}
    layer, expected = layer_of(tensors, config_of(fixture), tmp_path)
    assert layer is not None
    assert torch.equal(layer.floats(slice(0, 20)), expected)


def edit(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Changes a tensor of a fixture."""

    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"layer.{name}"] = change(tensors[f"layer.{name}"]).contiguous()

    return apply


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Takes a tensor of a fixture away."""
    return lambda tensors: tensors.__delitem__(f"layer.{name}")


def state(**values: object) -> Callable[[dict[str, Tensor]], None]:
    """Changes the settings that bitsandbytes stores; None removes one."""

    def change(tensor: Tensor) -> Tensor:
        content = {**json.loads(bytes(tensor.tolist())), **values}
        text = json.dumps({name: value for name, value in content.items() if value is not None})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit(STATE, change)


STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN = [
    ("fp8_per_output", edit("weight_scale", lambda t: t[1:]), r"weight_scale must be \[20, 1\] or .*, got \[19, 1\]"),
    ("fp8_per_output", edit("weight_scale", lambda t: t.to(torch.int8)), "weight_scale must be F32 or .*, got I8"),
    ("fp8_per_output", edit("weight", lambda t: t[:, 1:]), r"weight must be \[20, 96\], got \[20, 95\]"),
    ("fp8_per_output", drop("weight"), r"layer\.weight is missing"),
    ("w8a8", edit("weight", lambda t: t.float()), "weight must be I8 or .*, got F32"),
    (
        "w4a16",
        edit("weight_packed", lambda t: t[:, 1:]),
        r"weight_packed must be \[20, 12\] or \[20, 24\], got \[20, 11\]",
    ),
    ("w4a16", edit("weight_packed", lambda t: t.view(torch.uint8)), "weight_packed must be I32, got U8"),
    (
        "w4a16",
        edit("weight_scale", lambda t: t[:, :0]),
        "weight_scale must have groups of equal length of 96 inputs, got 0",
    ),
    ("w4a16", edit("weight_scale", lambda t: t.T), r"weight_scale must be \[20, 20\], got \[3, 20\]"),
    ("w4a16", edit("weight_shape", lambda t: t + 1), r"weight_shape must be \[20, 96\], got \[21, 97\]"),
    ("w4a16", drop("weight_scale"), r"layer\.weight_scale is missing"),
    ("w4a16_asymmetric", edit("weight_zero_point", lambda t: t[1:]), r"zero_point must be \[3, 3\], got \[2, 3\]"),
    ("bnb_nf4", edit("weight", lambda t: t[1:]), r"weight must be .*\[8712, 1\].*, got \[8711, 1\]"),
    ("bnb_nf4", edit("weight", lambda t: t[:4356]), r"weight must have 8712 bytes, got U8 \[4356, 1\]"),
    ("bnb_nf4", edit("weight.absmax", lambda t: t[1:]), r"absmax must be \[273\], got \[272\]"),
    ("bnb_nf4", drop("weight.absmax"), r"layer\.weight\.absmax is missing"),
    ("bnb_nf4", edit("weight.quant_map", lambda t: t[1:]), r"quant_map must be \[16\], got \[15\]"),
    ("bnb_nf4", drop(STATE), r"layer\.weight\.quant_state\.bitsandbytes__nf4 is missing"),
    ("bnb_nf4", edit(STATE, lambda t: t[:5]), "not a state of bitsandbytes: JSONDecodeError"),
    ("bnb_nf4", state(blocksize=None), "not a state of bitsandbytes: KeyError: 'blocksize'"),
    ("bnb_nf4", state(blocksize=0), "blocksize 0 and dtype bfloat16 are none"),
    ("bnb_nf4", state(blocksize="64"), "not a state of bitsandbytes: TypeError"),
    ("bnb_nf4", state(dtype="system"), "dtype system are none"),
    ("bnb_nf4", state(shape=[264, 66]), r"shape must be \[66, 264\], got \[264, 66\]"),
    ("bnb_nf4_nested", edit("weight.nested_absmax", lambda t: t[1:]), r"nested_absmax must be \[2\], got \[1\]"),
    ("bnb_int8", edit("SCB", lambda t: t[1:]), r"SCB must be \[24\], got \[23\]"),
    ("bnb_int8", edit("weight_format", lambda t: t + 2), r"weight_format must be 0 \(row\), got 2"),
    ("gptq_symmetric", edit("qweight", lambda t: t.T), r"qweight must be \[8, 32\] or \[16, 32\], got \[32, 8\]"),
    (
        "gptq_symmetric",
        edit("scales", lambda t: t[:, 1:]),
        r"scales must be \[2, 32\], got \[2, 31\]",
    ),
    ("gptq_symmetric", edit("qzeros", lambda t: t[1:]), r"qzeros must be \[2, 4\], got \[1, 4\]"),
    ("gptq_symmetric", drop("qzeros"), r"layer\.qzeros is missing"),
    ("gptq_act_order", edit("g_idx", lambda t: t[1:]), r"g_idx must be \[64\], got \[63\]"),
    ("gptq_act_order", edit("g_idx", lambda t: t + 1), r"g_idx must be in \[0, 2\), got 2"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_parts_that_do_not_fit_are_refused_by_file_and_tensor(
    name: str, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    fixture = next(file for file in FIXTURES if file.stem == name)
    tensors = load_file(fixture)
    change(tensors)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*" + message):
        layer_of(tensors, config_of(fixture), tmp_path)
