"""Adapters that cannot be honoured are refused by file, tensor or setting, and reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.adapters import CONFIGS, edit_tensors, save_adapter
from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import AdapterError, CheckpointError
from trimserve.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from trimserve.model.loading import describe_model, load_model

Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]

SELF = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.language_model.layers.0.input_layernorm"

SETTINGS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "fc1"], "modules_to_save": ["lm_head"]}


@pytest.fixture
def adapter(pair: Pair, tmp_path: Path) -> Path:
    """The folder of a sound adapter."""
    return save_adapter(tmp_path / "adapter", pair.folder, SETTINGS)


def configure(folder: Path, **settings: object) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refusal(pair: Pair, folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        pair.ours.load_adapter(folder)
    return str(caught.value).replace(f"{folder}/", "")


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


def without(*names: str) -> Edit:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def added(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Edit:
    return lambda tensors: {**tensors, name: torch.ones(shape, dtype=dtype)}


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    return poison


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_tensor(f"{SELF}.lora_A.weight", lambda a: a[:3]),
         f"{SELF}.lora_A.weight: must be [4, 64] with rank 4 (adapter_config.json), got [3, 64]"),
        (with_tensor(f"{SELF}.lora_B.weight", lambda b: b.T),
         f"{SELF}.lora_B.weight: must be [64, 4] with rank 4 (adapter_config.json), got [4, 64]"),
        (with_tensor("base_model.model.lm_head.weight", lambda w: w[:-8]),
         "base_model.model.lm_head.weight: must be [328, 64], got [320, 64]"),
        (with_tensor(f"{SELF}.lora_B.weight", poisoned(float("nan"))),
         f"{SELF}.lora_B.weight: must be finite in torch.float32, has NaN or infinite values"),
        (with_tensor("base_model.model.lm_head.weight", poisoned(float("inf"))),
         "base_model.model.lm_head.weight: must be finite in torch.float32, has NaN or infinite values"),
        (with_tensor(f"{SELF}.lora_A.weight", lambda a: a.to(torch.int8)),
         f"{SELF}.lora_A.weight: must be one of ['BF16', 'F16', 'F32', 'F64'], got I8"),
        (without(f"{SELF}.lora_B.weight"), f"{SELF}.lora_A.weight: the other matrix of the layer is missing"),
        (without(f"{SELF}.lora_A.weight", f"{SELF}.lora_B.weight"),
         "model.language_model.layers.0.self_attn.q_proj: is one of target_modules (adapter_config.json), but has no"),
        (without("base_model.model.lm_head.weight"),
         "lm_head: is one of modules_to_save (adapter_config.json), but has no tensors"),
        (added("base_model.model.model.language_model.layers.9.mlp.up_proj.lora_A.weight", 4, 64),
         "layers.9.mlp.up_proj.lora_A.weight: the model has no such layer (model.language_model.layers.9.mlp.up_proj)"),
        (added(f"{NORM}.weight", 64), "the model can adapt only linear layers and the token embedding"),
        (added(f"{SELF}.lora_magnitude_vector", 64), f"{SELF}.lora_magnitude_vector: not a tensor of a LoRA"),
        (added(f"{SELF}.bias", 64), f"{SELF}.bias: the layer of the model has no bias"),
        (added("lm_head.weight", 328, 64), "lm_head.weight: not a tensor of a LoRA; it must be base_model.model."),
        (added("base_model.model.language_model.lm_head.weight", 328, 64), "is there twice, also as base_model.model."),
        (lambda _: {}, "has no tensors"),
    ],
)  # fmt: skip
def test_tensors_are_refused_by_name_and_reason(pair: Pair, adapter: Path, edit: Edit, message: str) -> None:
    edit_tensors(adapter, edit)
    said = refusal(pair, adapter)
    assert said.startswith(f"{WEIGHTS_FILE}: ")
    assert message in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got IA3"),
        ({"use_dora": True}, "use_dora is not supported, got True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is not supported, got [3]"),
        ({"something_new": {"a": 1}}, "something_new is not supported, got {'a': 1}"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes the base model"),
        ({"r": 0}, "r: Input should be greater than or equal to 1, got 0"),
        ({"r": "eight"}, "r: Input should be a valid integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha: Input should be a finite number, got nan"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: Input should be greater than or equal to 1, got 0"),
        ({"alpha_pattern": {"(": 8}}, "'(' is not a regular expression"),
    ],
)
def test_settings_are_refused_by_name(pair: Pair, adapter: Path, settings: dict[str, object], message: str) -> None:
    configure(adapter, **settings)
    assert refusal(pair, adapter).startswith(f"{CONFIG_FILE}: {message}")


def test_a_rank_that_is_not_the_configs_is_refused(pair: Pair, adapter: Path) -> None:
    configure(adapter, rank_pattern={r"layers\.0\.self_attn\.q_proj": 8})
    assert "must be [8, 64] with rank 8 (adapter_config.json), got [4, 64]" in refusal(pair, adapter)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_files_that_are_missing_or_cut_are_refused(pair: Pair, adapter: Path, name: str) -> None:
    file = adapter / name
    content = file.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert refusal(pair, adapter).startswith(f"{name}: not ")
    file.unlink()
    assert refusal(pair, adapter).startswith(f"{name}: there is no such file")
    file.mkdir()
    assert refusal(pair, adapter).startswith(f"{name}: there is no such file")


def test_the_adapter_of_another_model_is_refused(pair: Pair, tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path / "other", Geometry(head_dim=8))
    folder = save_adapter(tmp_path / "adapter", tmp_path / "other", CONFIGS["text"])
    said = refusal(pair, folder)
    assert re.search(r"\.down_proj\.lora_B\.weight: must be \[64, 2\] with rank 2 .*, got \[32, 2\]", said)


def test_values_that_the_models_dtype_cannot_hold_are_refused(adapter: Path, pair: Pair) -> None:
    model = load_model(ModelConfig(model=str(pair.folder), dtype="float16"), EngineConfig())
    model.load_adapter(adapter)
    edit_tensors(adapter, with_tensor(f"{SELF}.lora_A.weight", poisoned(1e5)))
    with pytest.raises(AdapterError, match=r"must be finite in torch\.float16, has NaN"):
        model.load_adapter(adapter)


def test_an_adapter_is_checked_before_weights_are_read(pair: Pair, adapter: Path) -> None:
    config = ModelConfig(model=str(pair.folder), adapter=(f"mine={adapter}",))
    describe_model(config, EngineConfig())
    edit_tensors(adapter, with_tensor(f"{SELF}.lora_B.weight", poisoned(float("nan"))))
    with pytest.raises(CheckpointError, match="must be finite"):
        describe_model(config, EngineConfig())


def test_patterns_and_exceptions_may_leave_layers_out(pair: Pair, tmp_path: Path) -> None:
    exceptions: list[dict[str, Any]] = [
        {"layers_to_transform": [0]},
        {"exclude_modules": r".*vision_model.*"},
        {"target_modules": r".*\.0\..*q_proj"},
    ]
    for number, settings in enumerate(exceptions):
        folder = save_adapter(tmp_path / str(number), pair.folder, {"r": 2, "target_modules": ["q_proj"], **settings})
        assert pair.ours.load_adapter(folder).rank == 2


def test_embeddings_that_were_saved_unchanged_take_no_memory(pair: Pair, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, pair.folder, CONFIGS["tokens"])
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_FILE).values())
    adapter = pair.ours.load_adapter(folder)
    assert adapter.modules == ("lm_head", "model.language_model.embed_tokens")
    assert adapter.nbytes < 20_000 < 160_000 < stored
    changed = load_file(folder / WEIGHTS_FILE)
    changed["base_model.model.model.language_model.embed_tokens.base_layer.weight"] += 1
    save_file(changed, folder / WEIGHTS_FILE)
    assert pair.ours.load_adapter(folder).nbytes > 80_000
