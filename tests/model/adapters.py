"""Adapters with random weights, made and merged by PEFT itself."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

from trimserve.model.adapter_files import WEIGHTS_FILE

__all__ = ["CONFIGS", "edit_tensors", "save_adapter", "save_merged", "spell_as_before"]

_TEXT = r".*language_model\.layers\.\d+"

CONFIGS: dict[str, dict[str, Any]] = {
    "vision": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*vision_model.*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)|.*multi_modal_projector",
        "bias": "lora_only",
    },
    "cross": {"r": 3, "use_rslora": True, "target_modules": r".*cross_attn\.(q_proj|k_proj|v_proj|o_proj)"},
    "text": {
        "r": 2,
        "target_modules": _TEXT + r"\.(self_attn\.(q_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))",
        "rank_pattern": {"q_proj": 5, r"layers\.2\.mlp\.up_proj": 1},
        "alpha_pattern": {"v_proj": 3},
    },
    "vocabulary": {
        "r": 2,
        "target_modules": _TEXT + r"\.(self|cross)_attn\.k_proj",
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "tokens": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
}
"""Settings of `LoraConfig` by a name; every kind of layer is in one of them."""


def save_adapter(folder: Path, checkpoint: Path, settings: dict[str, Any], seed: int = 0) -> Path:
    """Write an adapter of a checkpoint that changes every layer it targets; returns the folder."""
    base = MllamaForConditionalGeneration.from_pretrained(checkpoint)
    with warnings.catch_warnings(action="ignore"):  # of PEFT about itself, transformers, and what it will merge
        model = get_peft_model(base, LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                if "lora_" in name:
                    parameter.normal_(0, 0.7 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(str(folder))
    return folder


def save_merged(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """Write the checkpoint that a checkpoint and an adapter are together; returns the folder."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    base = MllamaForConditionalGeneration.from_pretrained(checkpoint)
    with warnings.catch_warnings(action="ignore"):
        merged: Any = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    return folder


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of an adapter's file."""
    file = adapter / WEIGHTS_FILE
    save_file(edit(load_file(file)), file)


def spell_as_before(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that PEFT gave before transformers 4.52 renamed the modules."""
    old = {
        r"^base_model\.model\.model\.language_model\.": "base_model.model.language_model.model.",
        r"^base_model\.model\.lm_head\.": "base_model.model.language_model.lm_head.",
        r"^base_model\.model\.model\.(vision_model|multi_modal_projector)": r"base_model.model.\1",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for now, before in old.items():
            name = re.sub(now, before, name)
        renamed[name] = tensor
    return renamed
