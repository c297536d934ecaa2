"""What loading accepts, what it refuses by name, and what it costs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration

from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from trimserve import ops
from trimserve.api.prompt import RawPrompt
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.model.checkpoint import open_checkpoint
from trimserve.model.loading import describe_model, load_model, load_processor
from trimserve.model.mllama import Mllama
from trimserve.model.weights import fused_weight, load_weights


def load(folder: Path | str, **model_config: Any) -> Mllama:
    """Load with defaults."""
    return load_model(ModelConfig(model=str(folder), **model_config), EngineConfig())


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def weights(folder: Path) -> MllamaForConditionalGeneration:
    """Only the weights."""
    return load_weights(folder, MllamaConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))


def test_parameters_equal_those_that_transformers_loads(checkpoint: Path) -> None:
    expected = dict(MllamaForConditionalGeneration.from_pretrained(checkpoint).named_parameters())
    loaded = dict(weights(checkpoint).named_parameters())
    assert loaded.keys() == expected.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, expected[name]), name


def test_fused_weights_share_the_parameters_storage(checkpoint: Path) -> None:
    attention = weights(checkpoint).model.language_model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    qkv = fused_weight(linears)
    parts = [linear.weight for linear in linears]
    assert torch.equal(qkv, torch.cat(parts))
    assert qkv.data_ptr() == parts[0].data_ptr()
    assert qkv.untyped_storage().nbytes() == sum(part.numel() * part.element_size() for part in parts)


def test_sharded_checkpoints_with_current_and_with_old_names_load(checkpoint: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    MllamaForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    tensors = load_file(checkpoint / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)  # the names of Meta's checkpoints
    renamed = {
        name.replace("language_model.lm_head", "lm_head") if "lm_head" in name
        else f"model.{name.replace('language_model.model', 'language_model')}": tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    for folder in (sharded, checkpoint):
        loaded = dict(weights(folder).named_parameters())
        assert torch.equal(loaded["lm_head.weight"], tensors["language_model.lm_head.weight"])
    save_file(renamed, checkpoint / "model.safetensors")
    assert torch.equal(dict(weights(checkpoint).named_parameters())["lm_head.weight"], renamed["lm_head.weight"])


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["consolidated.00.pth", "params.json", "tokenizer.model"], "consolidated.00.pth"),
        (["consolidated.pth", "params.json"], "consolidated.pth"),
        (["params.json"], "params.json"),
    ],
)
def test_metas_own_folder_is_refused_saying_what_to_take_instead(tmp_path: Path, files: list[str], named: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: {named} is Meta's own format.*take the safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(model_type="llava"), "model_type must be mllama, got llava"),
        (
            "config.json",
            lambda c: c.update(quantization_config={"quant_method": "awq"}),
            r"config\.json: quantization_config with quant_method awq is not supported",
        ),
        (
            "config.json",
            lambda c: c.update(transformers_weights="other.safetensors"),
            r"config\.json: transformers_weights must be model\.safetensors, if anything, got other\.safetensors",
        ),
        (
            "config.json",
            lambda c: c.update(transformers_weights="model.safetensors.index.json"),
            r"transformers_weights must be model\.safetensors, if anything, got model\.safetensors\.index\.json",
        ),
        ("config.json", lambda c: c.update(dtype="nonsense"), "nonsense"),
        ("config.json", lambda c: c["text_config"].update(hidden_size="wide"), "wide"),
        ("config.json", lambda c: c["text_config"].update(num_hidden_layers=6), "parameters are in no file"),
        (
            "config.json",
            lambda c: c["text_config"].update(intermediate_size=64),
            r"must be \[64, 64\], got \[48, 64\]",
        ),
        ("config.json", lambda c: c["text_config"].update(num_hidden_layers=4), "is not part of an Mllama"),
        (
            "preprocessor_config.json",
            lambda c: c["size"].update(height=32, width=32),
            "the vision config takes",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_honoured_is_refused_by_name(
    checkpoint: Path, file: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_json(checkpoint / file, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_refused_saying_how_to_load_it(checkpoint: Path, has_config: bool) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    if not has_config:
        (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"makes it an adapter: .* --adapter NAME={checkpoint}"):
        load(checkpoint)


def test_only_safetensors_are_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "not a complete safetensors file"),
        ("model.safetensors", b"garbage" * 100, "not a complete safetensors file"),
        ("config.json", b"\xff\xfe", "not readable as JSON"),
        ("config.json", b"[]", "must be a JSON object, got list"),
        ("trimserve.json", b'{"k_ratio": 5}', "k_ratio: .*less than or equal to 1, got 5"),
        ("trimserve.json", b'{"merge_ratio": -1}', "merge_ratio: .*greater than or equal to 0, got -1"),
        ("trimserve.json", b'{"k_ratio": "many"}', "k_ratio: .*valid number.*, got 'many'"),
        ("generation_config.json", b'{"max_new_tokens": 0}', "max_new_tokens: .*, got 0"),
        ("generation_config.json", b'{"temperature": -1}', "temperature: .*, got -1"),
        ("generation_config.json", b'{"top_k": 4294967296}', "top_k: .*less than or equal to 4294967295"),
        ("generation_config.json", b'{"max_new_tokens": 4294967296}', "max_new_tokens: .*less than or equal to"),
        ("generation_config.json", b'{"eos_token_id": -1}', r"eos_token_id must be in \[0, 2\^32\), got -1"),
        ("generation_config.json", b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_broken_file_is_named(checkpoint: Path, file: str, content: bytes, message: str) -> None:
    (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert file in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"])
def test_a_link_that_leads_nowhere_is_named(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink(missing_ok=True)
    (checkpoint / file).symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=f"{checkpoint}/{file}: cannot be read: No such file or directory"):
        load(checkpoint)


def test_names_of_files_and_folders_may_be_any_bytes(checkpoint: Path) -> None:
    (checkpoint / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    folder = checkpoint.rename(checkpoint.parent / os.fsdecode(b"caf\xe9"))
    assert open_checkpoint(str(folder), None, with_weights=True).model_id == "caf\N{REPLACEMENT CHARACTER}"


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(checkpoint)


def test_without_a_gpu_the_model_is_on_the_cpu_and_cuda_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(checkpoint).info.device == "cpu"
    with pytest.raises(CheckpointError, match="device cuda: torch sees no GPU"):
        load(checkpoint, device="cuda")


def test_a_gpu_is_taken_where_the_ops_are_built_for_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device(**knobs: Any) -> str:
        return describe_model(ModelConfig(model=str(checkpoint), **knobs), EngineConfig()).device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "has_cuda_ops", lambda: True)
    assert [device(), device(device="cuda"), device(device="cpu")] == ["cuda:0", "cuda:0", "cpu"]
    assert device(device="cpu", quantize="int8") == "cpu"
    assert device(device="cpu", quantize="int4") == "cpu"
    assert device(quantize="int8") == "cuda:0"
    with pytest.raises(CheckpointError, match="quantize int4 is for the CPU; take none or int8, or device cpu"):
        device(quantize="int4")
    monkeypatch.setattr(ops, "has_cuda_ops", lambda: False)
    assert device() == "cpu"
    with pytest.raises(CheckpointError, match="device cuda: the ops are built without CUDA"):
        device(device="cuda")


def test_a_null_quantization_config_is_none(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(quantization_config=None))
    assert load(checkpoint).info.vocab_size > 0


def test_a_description_needs_no_weights_and_is_that_of_the_loaded_model(checkpoint: Path) -> None:
    loaded = load(checkpoint).info
    assert loaded.model_id == checkpoint.name
    config = ModelConfig(model=str(checkpoint))
    assert describe_model(config, EngineConfig()) == loaded
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert describe_model(config, EngineConfig()).num_parameters == loaded.num_parameters


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match=r"\./nope: no such folder"):
        load("./nope")


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(CheckpointError, match="~nobody-at-all/model: no such folder: Could not determine home"):
        load("~nobody-at-all/model")


def test_a_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no/such-model: neither a folder nor a hub model"):
        load("no/such-model")


def test_a_hub_id_loads_from_the_cache_at_its_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/hub/models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))  # HF_HOME's
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    info = load("someone/a-model").info
    assert (info.model_id, info.revision) == ("someone/a-model", commit)


def test_a_context_past_the_checkpoints_is_refused(checkpoint: Path) -> None:
    assert load(checkpoint, max_model_len=100).info.max_model_len == 100
    with pytest.raises(CheckpointError, match=r"max_model_len must be at most 512, .* got 513"):
        load(checkpoint, max_model_len=513)


def test_the_revision_of_a_folder_changes_with_its_weights(checkpoint: Path) -> None:
    before = load(checkpoint).info.revision
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["language_model.lm_head.weight"] += 1
    save_file(tensors, checkpoint / "model.safetensors")
    assert load(checkpoint).info.revision != before


def test_prompts_are_prepared_without_weights_as_beside_the_model(checkpoint: Path) -> None:
    prompt = RawPrompt("a few words")
    expected = load(checkpoint).processor.prepare(prompt)
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    assert load_processor(ModelConfig(model=str(checkpoint)), EngineConfig()).prepare(prompt) == expected


def test_the_recommended_trimming_comes_from_the_knobs_then_the_checkpoint_then_the_paper(checkpoint: Path) -> None:
    def defaults(**knobs: float) -> tuple[float, float]:
        info = load(checkpoint, **knobs).info
        return info.default_k_ratio, info.default_merge_ratio

    assert defaults() == (0.2, 0.0)
    (checkpoint / "trimserve.json").write_text('{"k_ratio": 0.35, "merge_ratio": 0.1}')
    assert defaults() == (0.35, 0.1)
    assert defaults(k_ratio=0.5, merge_ratio=0.0) == (0.5, 0.0)


def test_weights_of_another_width_are_refused_before_memory_is_taken(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c["text_config"].update(intermediate_size=2**30))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight must be \[\d+, \d+\], got \["):
        load(checkpoint)


PEAK = """
import pathlib, sys, torch
from transformers import MllamaConfig
from trimserve.model.weights import load_weights

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

folder = pathlib.Path(sys.argv[1])
config = MllamaConfig.from_pretrained(folder)
torch.ones(1024, 1024) @ torch.ones(1024, 1024)
before = peak()
model = load_weights(folder, config, getattr(torch, sys.argv[2]), torch.device("cpu"))
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_loading_into_another_dtype_peaks_at_the_weights_and_15_percent(tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path, Geometry(num_kv_heads=4, heads_per_kv=4, head_dim=64, intermediate_size=4096))
    command = [sys.executable, "-c", PEAK, str(tmp_path), "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.15


def test_a_loaded_model_multiplies_float32_unrounded() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does at import
        load_model(ModelConfig(), EngineConfig())
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
