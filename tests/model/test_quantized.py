"""Whole quantized checkpoints: what stays as it is stored, what becomes floats, and what that costs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from tests.model.conftest import Pair
from tests.model.peer import Peer
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.model.test_mllama import ONE, assert_logits_equal, noise, raw
from trimserve import ops
from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig, ModelConfig, Quantize
from trimserve.errors import CheckpointError
from trimserve.model.int4 import pack_int4
from trimserve.model.int8 import to_int8
from trimserve.model.loading import describe_model, load_model
from trimserve.model.quantization import SCALES
from trimserve.model.stored_tensors import row_slices
from trimserve.model.weights import load_weights

Tensors = dict[str, Tensor]
Write = Callable[[Tensor], Tensors]

CONFIG = {"quant_method": "compressed-tensors"}
DECODER = "language_model.model.layers."
OUTPUT = "language_model.lm_head.weight"
LINEAR = "_proj.weight"


def w8a8(weight: Tensor) -> Tensors:
    """As compressed-tensors writes int8."""
    numbers, scales = to_int8(weight)
    return {"weight": numbers, "weight_scale": scales[:, None]}


def fp8(weight: Tensor) -> Tensors:
    """As compressed-tensors writes float8."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales}


def w4a16(weight: Tensor, group: int = 32) -> Tensors:
    """As compressed-tensors writes numbers of 4 bits."""
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(2) / 8).half()
    numbers = (groups / scales[:, :, None].float()).round().clamp(-8, 7).flatten(1).to(torch.int32)
    places = (numbers + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4, dtype=torch.int32)
    return {
        "weight_packed": places.sum(2).to(torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def int4(parts: Tensors) -> Tensor:
    """The numbers in what `w4a16` wrote, as they are multiplied."""
    numbers = (parts["weight_packed"][:, :, None] >> torch.arange(0, 32, 4)) & 15
    return pack_int4(numbers.flatten(1) - 8)


def floats(parts: Tensors) -> Tensor:
    """What either of them stands for."""
    return parts["weight"].float() * parts["weight_scale"]


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer in the decoder's layers."""
    return name.startswith(DECODER) and name.endswith(LINEAR)


def quantize(folder: Path, names: Iterable[str], write: Write, config: dict[str, Any] = CONFIG) -> dict[str, Tensors]:
    """Store some weights of a checkpoint in a format, and tell what was stored by the layer's name."""
    tensors = load_file(folder / "model.safetensors")
    layers = {name.removesuffix(".weight"): write(tensors.pop(name)) for name in names}
    parts = {f"{layer}.{part}": tensor for layer, of_layer in layers.items() for part, tensor in of_layer.items()}
    save_file({**tensors, **parts}, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return layers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose names are those before transformers 4.52."""
    save_random_checkpoint(tmp_path, Geometry())
    return tmp_path


def linears(folder: Path) -> list[str]:
    return [name for name in load_file(folder / "model.safetensors") if is_linear(name)]


def weights(folder: Path, dtype: torch.dtype = torch.float32, **knobs: Any) -> MllamaForConditionalGeneration:
    return load_weights(folder, MllamaConfig.from_pretrained(folder), dtype, torch.device("cpu"), **knobs)


def described(folder: Path, **knobs: Any) -> ModelInfo:
    return describe_model(ModelConfig(model=str(folder), **knobs), EngineConfig())


def layer(model: MllamaForConditionalGeneration, name: str) -> Any:
    """The layer that a checkpoint names in the old way."""
    current = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
    return model.get_submodule(current)


def test_w8a8_stays_as_it_is_stored(folder: Path) -> None:
    exact = load_model(ModelConfig(model=str(folder)), EngineConfig()).info
    stored = quantize(folder, [*linears(folder), OUTPUT], w8a8)
    either: tuple[dict[str, Any], ...] = ({}, {"quantize": "int8"})
    for knobs in either:
        model = weights(folder, **knobs)
        for name, parts in stored.items():
            assert torch.equal(layer(model, name).weight, parts["weight"])
            assert torch.equal(getattr(layer(model, name), SCALES), parts["weight_scale"][:, 0])
        info = load_model(ModelConfig(model=str(folder), **knobs), EngineConfig()).info
        assert info == described(folder, **knobs)
        assert (info.quantization, info.num_parameters) == ("int8", exact.num_parameters)
        saved = sum(3 * part.numel() for parts in stored.values() for part in [parts["weight"]])
        added = sum(4 * len(parts["weight"]) for parts in stored.values())
        assert info.weight_bytes == exact.weight_bytes - saved + added


@pytest.fixture
def folder_of_whole_groups(tmp_path: Path) -> Path:
    """A checkpoint whose linear layers have inputs that are whole groups."""
    save_random_checkpoint(tmp_path, Geometry(num_kv_heads=2, heads_per_kv=2, head_dim=16, intermediate_size=128))
    return tmp_path


@pytest.mark.parametrize("quantize_as", ["none", "int4"])
@pytest.mark.parametrize("group", [32, 64])
def test_w4a16_stays_as_it_is_stored(folder_of_whole_groups: Path, group: int, quantize_as: Quantize) -> None:
    folder = folder_of_whole_groups
    exact = described(folder)
    stored = quantize(folder, [*linears(folder), OUTPUT], lambda weight: w4a16(weight, group))
    model = weights(folder, quantize=quantize_as)
    for name, parts in stored.items():
        assert torch.equal(layer(model, name).weight, int4(parts))
        assert torch.equal(getattr(layer(model, name), SCALES), parts["weight_scale"])
    info = load_model(ModelConfig(model=str(folder), quantize=quantize_as), EngineConfig()).info
    assert info == described(folder, quantize=quantize_as)
    assert (info.quantization, info.num_parameters) == ("int4", exact.num_parameters)
    held = sum(parts["weight_packed"].nbytes + parts["weight_scale"].nbytes for parts in stored.values())
    before = sum(8 * parts["weight_packed"].nbytes for parts in stored.values())
    assert info.weight_bytes == exact.weight_bytes - before + held


def test_logits_of_stored_w4a16_are_those_of_transformers_with_its_floats(
    folder_of_whole_groups: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of_whole_groups
    exact = shutil.copytree(folder, tmp_path_factory.mktemp("floats"), dirs_exist_ok=True)
    stored = quantize(folder, [*linears(folder), OUTPUT], w4a16)
    tensors = load_file(exact / "model.safetensors")
    for name, parts in stored.items():
        numbers = (parts["weight_packed"][:, :, None] >> torch.arange(0, 32, 4) & 15) - 8
        groups = numbers.flatten(1).unflatten(1, (-1, 32)) * parts["weight_scale"].float()[:, :, None]
        tensors[f"{name}.weight"] = groups.flatten(1)
    save_file(tensors, exact / "model.safetensors", {"format": "pt"})
    model = load_model(ModelConfig(model=str(folder)), EngineConfig())
    assert model.info.quantization == "int4"
    pair = Pair(folder, model, Peer(exact))
    image = noise((1, 2), model.info.tile_size)
    for prompt, images in ((raw(ONE, [image]), [image]), (raw("just words " * 10, []), [])):
        assert_logits_equal(pair, prompt, images)


def test_w4a16_in_some_layers_of_the_decoder_only_becomes_floats(folder_of_whole_groups: Path) -> None:
    one, *others = linears(folder_of_whole_groups)
    quantize(folder_of_whole_groups, others, w4a16)
    assert described(folder_of_whole_groups).quantization == "none"
    model = weights(folder_of_whole_groups, quantize="int8")
    assert {layer(model, name.removesuffix(".weight")).weight.dtype for name in (one, *others)} == {torch.int8}


@pytest.mark.parametrize("with_output", [False, True])
def test_the_output_layer_stays_int8_alone_and_the_others_together(folder: Path, with_output: bool) -> None:
    one, *others = linears(folder)
    stored = quantize(folder, [*others, *([OUTPUT] if with_output else [])], w8a8)
    model = weights(folder)
    for name, parts in stored.items():
        is_output = f"{name}.weight" == OUTPUT
        expected = parts["weight"] if is_output else floats(parts)
        assert torch.equal(layer(model, name).weight, expected)
    assert layer(model, one.removesuffix(".weight")).weight.dtype == torch.float32
    assert described(folder).quantization == ("int8" if with_output else "none")


def test_on_a_gpu_w8a8_becomes_floats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = described(folder)
    quantize(folder, linears(folder), w8a8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "has_cuda_ops", lambda: True)
    info = described(folder, device="cuda")
    assert (info.quantization, info.weight_bytes) == ("none", exact.weight_bytes)


@pytest.mark.parametrize("write", [fp8, w8a8])
def test_any_linear_layer_may_be_quantized(folder: Path, write: Write) -> None:
    names = [name for name in load_file(folder / "model.safetensors") if "vision_model" in name and LINEAR in name]
    stored = quantize(folder, [*names, "multi_modal_projector.weight"], write)
    model = weights(folder)
    for name, parts in stored.items():
        assert torch.equal(layer(model, f"model.{name}").weight, floats(parts))
    assert described(folder).quantization == "none"


def test_float8_becomes_floats_of_the_dtype_or_what_quantize_says(folder: Path) -> None:
    stored = quantize(folder, linears(folder), fp8)
    half, int8 = weights(folder, torch.bfloat16), weights(folder, quantize="int8")
    for name, parts in stored.items():
        assert torch.equal(layer(half, name).weight, floats(parts).bfloat16())
        numbers, scales = to_int8(floats(parts))
        assert torch.equal(layer(int8, name).weight, numbers)
        assert torch.equal(getattr(layer(int8, name), SCALES), scales)


def test_a_layers_parts_may_lie_in_different_shards(folder: Path) -> None:
    stored = quantize(folder, linears(folder), fp8)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{2 - name.endswith('_scale')}.safetensors" for name in tensors}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    model = weights(folder)
    for name, parts in stored.items():
        assert torch.equal(layer(model, name).weight, floats(parts))


def test_the_dtype_of_a_config_without_one_is_not_that_of_scales(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    quantize(folder, linears(folder), lambda weight: fp8(weight.float()))
    content = json.loads((folder / "config.json").read_text())
    content.pop("dtype")
    (folder / "config.json").write_text(json.dumps(content))
    assert described(folder).dtype == "bfloat16"


def more(weight: Tensor) -> Tensors:
    """A part that no format has."""
    return {**fp8(weight), "weight_scale_inv": torch.ones(1)}


def short(weight: Tensor) -> Tensors:
    """Scales of the wrong shape."""
    parts = w8a8(weight)
    return {**parts, "weight_scale": parts["weight_scale"][1:].contiguous()}


@pytest.mark.parametrize(
    ("write", "config", "message"),
    [
        (fp8, {"quant_method": "fp8"}, r"config\.json: .* quant_method fp8 is not supported: compressed-tensors, "),
        (fp8, {"bits": 4}, "quant_method None is not supported"),
        (fp8, ["gptq"], r"quant_method \['gptq'\] is not supported"),
        (more, CONFIG, r"model\.safetensors: .*weight_scale_inv is not part of an Mllama"),
        (short, CONFIG, r"model\.safetensors: .*weight_scale must be \[\d+, 1\] or .*, got \[\d+, 1\]"),
        (lambda weight: {"weight": w8a8(weight)["weight"]}, CONFIG, "is I8 without the scales of a quantized weight"),
        (lambda weight: {"weight_packed": weight.int()}, CONFIG, r"weight_packed must be .*, got"),
    ],
)
def test_what_is_not_read_is_refused_by_name(folder: Path, write: Write, config: Any, message: str) -> None:
    quantize(folder, linears(folder), write, config)
    with pytest.raises(CheckpointError, match=message):
        load_model(ModelConfig(model=str(folder)), EngineConfig())


def test_old_configs_of_bitsandbytes_name_no_method(folder: Path) -> None:
    quantize(folder, linears(folder), fp8, {"load_in_8bit": True})
    assert described(folder).dtype == "float32"


@pytest.mark.parametrize("shape", [(1,), (7, 3), (1000, 5000), (3, 4_000_000), (0, 4)])
@pytest.mark.parametrize("multiple", [1, 8])
def test_slices_cover_all_rows_and_begin_at_multiples(shape: tuple[int, ...], multiple: int) -> None:
    parts = list(row_slices(shape, multiple))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(shape[0]))
    assert all(part.start % multiple == 0 for part in parts)


PEAK = """
import pathlib, sys, torch
from transformers import MllamaConfig
from trimserve.model.weights import load_weights, weight_bytes

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

folder = pathlib.Path(sys.argv[1])
config = MllamaConfig.from_pretrained(folder)
(torch.ones(1024, 1024) @ torch.ones(1024, 1024)).to(torch.float8_e4m3fn).float()
before = peak()
model = load_weights(folder, config, torch.bfloat16, torch.device("cpu"))
print((peak() - before) / weight_bytes(model.modules()))
"""


@pytest.mark.parametrize("write", [fp8, w8a8])
def test_loading_a_quantized_checkpoint_peaks_at_what_it_becomes_and_a_layer(tmp_path: Path, write: Write) -> None:
    geometry = Geometry(num_kv_heads=4, heads_per_kv=4, head_dim=64, intermediate_size=4096)
    save_random_checkpoint(tmp_path, replace(geometry, num_layers=12))
    quantize(tmp_path, linears(tmp_path), write)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.25
