"""Checkpoint folders as people have them: read as transformers reads them, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.model.checkpoint import open_checkpoint
from trimserve.model.loading import describe_model
from trimserve.model.weights import load_weights

Tensors = dict[str, Tensor]
Change = Callable[[Path], object]

GATE = "model.language_model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with current names in one file."""
    folder = tmp_path_factory.mktemp("original")
    save_random_checkpoint(folder, Geometry())
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def loaded(folder: Path) -> Tensors:
    """The parameters, as served with defaults."""
    checkpoint = open_checkpoint(str(folder), None, with_weights=True)
    model = load_weights(folder, checkpoint.config, checkpoint.dtype("auto"), torch.device("cpu"))
    return dict(model.named_parameters())


def by_transformers(folder: Path) -> Tensors:
    """The same as transformers reads them."""
    return dict(MllamaForConditionalGeneration.from_pretrained(folder, dtype="auto").named_parameters())


def rewrite(change: Callable[[Tensors], Tensors]) -> Change:
    """Changes the tensors of the one file."""
    return lambda folder: save(folder, "model.safetensors", change(load_file(folder / "model.safetensors")))


def save(folder: Path, file: str, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def rename(*pairs: tuple[str, str]) -> Change:
    """Gives tensors that begin with the first word the second; the first pair that fits counts."""

    def renamed(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rewrite(lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})


def configure(**values: Any) -> Change:
    """Sets keys of `config.json`, those of a part after its name; None removes them."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            part, _, key = name.rpartition("__")
            place = content[part] if part else content
            place.pop(key, None)
            if value is not None:
                place[key] = value
        (folder / "config.json").write_text(json.dumps(content))

    return change


def shards(*parts: Callable[[str], bool], extra: Tensors | None = None, index: bool = True) -> Change:
    """Cuts the one file: tensors whose name a part takes go into its file, the others and `extra` into the last."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = [{name: tensors.pop(name) for name in list(tensors) if part(name)} for part in (*parts, bool)]
        files[-1].update(extra or {})
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        for file, content in zip(names, files, strict=True):
            save(folder, file, content)
        if index:
            weight_map = {name: file for file, content in zip(names, files, strict=True) for name in content}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def is_vision(name: str) -> bool:
    return "vision" in name


def stale_index(folder: Path) -> None:
    """Leaves an index of shards that are gone beside the whole file."""
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00005.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def older_shards(folder: Path) -> None:
    """Leaves an index and shards of other weights beside the whole file."""
    tensors = load_file(folder / "model.safetensors")
    shards(is_vision)(folder)
    save(folder, "model.safetensors", {**tensors, "lm_head.weight": -tensors["lm_head.weight"]})


in_bfloat16 = rewrite(lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})


def both(*changes: Change) -> Change:
    """One change after the other."""
    return lambda folder: [change(folder) for change in changes]


def twice(folder: Path) -> None:
    """Stores a tensor in two shards."""
    gate = load_file(folder / "model.safetensors")[GATE]
    shards(lambda name: name == GATE or is_vision(name), extra={GATE: gate})(folder)


ROTARY = "model.language_model.rotary_emb.inv_freq"
BUFFERS = {
    ROTARY: torch.ones(8),
    "model.language_model.rotary_emb.original_inv_freq": torch.ones(8),
    "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.language_model.layers.2.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 4, 16),
    "model.vision_model.embeddings.position_ids": torch.arange(4),
}

FOLDERS: dict[str, Change] = {
    "current names": lambda _: None,
    "names before transformers 4.52": rename(
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", "")
    ),
    "both conventions mixed": rename(
        ("model.language_model.", "model.language_model.model."), ("lm_head.", "language_model.lm_head.")
    ),
    "saved without the outer model": rename(("model.", "")),
    "shards": shards(is_vision),
    "an index of shards that are gone": stale_index,
    "an index of older shards": older_shards,
    "a tensor in two shards": twice,
    "computed buffers": rewrite(lambda tensors: {**tensors, **BUFFERS}),
    "dtype at the top, in its old spelling": configure(dtype=None, torch_dtype="bfloat16"),
    "dtype at the top, files in another": both(in_bfloat16, configure(dtype="float32")),
    "no dtype, files in bfloat16": both(in_bfloat16, configure(dtype=None)),
    "no dtype, shards in bfloat16": both(in_bfloat16, shards(is_vision), configure(dtype=None)),
    "no dtype, files in float32": configure(dtype=None),
    "dtype in the parts, files in bfloat16": both(
        in_bfloat16,
        configure(dtype=None, text_config__dtype="bfloat16", vision_config__dtype="bfloat16"),
    ),
    "dtype in the parts, in its old spelling": both(
        in_bfloat16,
        configure(dtype=None, text_config__torch_dtype="bfloat16", vision_config__torch_dtype="bfloat16"),
    ),
    "rope in its old spelling": configure(
        text_config__rope_parameters=None,
        text_config__rope_theta=10000.0,
        text_config__rope_scaling={"rope_type": "default"},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(folder: Path, name: str) -> None:
    FOLDERS[name](folder)
    expected, got = by_transformers(folder), loaded(folder)
    assert got.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert got[parameter].dtype == tensor.dtype, parameter
        assert torch.equal(got[parameter], tensor), parameter
    assert describe_model(ModelConfig(model=str(folder)), EngineConfig()).dtype == str(tensor.dtype)[len("torch.") :]


def test_the_dtype_of_a_part_goes_before_that_of_the_files(folder: Path) -> None:
    configure(dtype=None, text_config__dtype="float16")(folder)
    assert {tensor.dtype for tensor in loaded(folder).values()} == {torch.float16}


def other_weights(folder: Path) -> None:
    """Stores a tensor differently in two shards."""
    gate = load_file(folder / "model.safetensors")[GATE]
    shards(lambda name: name == GATE or is_vision(name), extra={GATE: gate + 1})(folder)


def other_name(folder: Path) -> None:
    """Stores a parameter under its old and its current name, differently."""
    rewrite(lambda tensors: {**tensors, "language_model.lm_head.weight": tensors["lm_head.weight"] + 1})(folder)


def truncated(folder: Path) -> None:
    """Cuts the end of a shard."""
    shards(is_vision)(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_shard(folder: Path) -> None:
    shards(is_vision)(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def only_index(content: str) -> Change:
    """Replaces the one file by an index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "a tensor that differs between shards": (
        other_weights,
        rf"model-00002-of-00002\.safetensors: {GATE}: differs from {GATE} in model-00001",
    ),
    "a tensor that differs between two names": (
        other_name,
        r"lm_head\.weight: differs from .*lm_head\.weight in model",
    ),
    "shards without an index": (
        shards(is_vision, index=False),
        r"has model-00001-of-00002\.safetensors and 1 others, but neither model\.safetensors nor .*index\.json",
    ),
    "a missing shard": (without_a_shard, r"index\.json: names model-00002-of-.*which is not there \(1 of 2 files\)"),
    "a truncated shard": (truncated, r"model-00002-of-00002\.safetensors: not a complete safetensors file"),
    "an index that is not JSON": (only_index("{"), "not readable as JSON"),
    "an index without a map": (only_index("{}"), r"index\.json: must have an object weight_map"),
    "an unknown tensor": (
        rewrite(lambda tensors: {**tensors, "model.extra": torch.ones(1)}),
        r"model\.safetensors: model\.extra is not part of an Mllama",
    ),
    "a wrapper's prefix": (rename(("", "module.")), r"module\..* is not part of an Mllama"),
    "no output layer": (
        rewrite(lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}),
        r"1 parameters are in no file, the first is lm_head\.weight",
    ),
    "integers": (
        rewrite(lambda tensors: {**tensors, GATE: tensors[GATE].to(torch.int8)}),
        rf"{GATE} is I8 without the scales of a quantized weight",
    ),
    "a dtype that is none": (configure(dtype="auto"), "auto"),
    "a dtype that is not computed in": (
        configure(dtype="float64"),
        "must be float32, bfloat16 or float16, got .*float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_makes_no_sense_is_refused_by_name(folder: Path, name: str) -> None:
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        loaded(folder)
