"""Files of what policies have learned (`trimming/trained.py`), each for one model. They know no training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.errors import CheckpointError
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.trained import Shape, Trained

__all__ = ["Progress", "load_trained", "load_trained_files", "methods_of", "save_trained", "shape_of", "trainable"]

_METADATA = "trimserve"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the training had come at some step."""

    step: int
    loss: float
    """Mean over questions that are not learned from, see `Student.loss`."""


def trainable() -> Mapping[str, type[Trained]]:
    """What can be trained, by the policies' names."""
    return {name: policy.trained for name, policy in POLICIES.items() if policy.trained is not None}


def shape_of(info: ModelInfo, rows: int) -> Shape:
    """What a module for a model is made for."""
    return Shape(info.hidden_size, info.features_per_tile, info.num_cross_attention_layers, rows)


def save_trained(
    file: Path,
    method: str,
    module: Trained,
    info: ModelInfo,
    intermediate_features: str,
    curve: Sequence[Progress],
    training: Mapping[str, float | str],
) -> None:
    """Write what a policy has learned; equal weights and curves give equal bytes.

    Args:
        file: safetensors.
        method: name of the policy.
        module: its weights.
        info: of the model it was trained for.
        intermediate_features: where the model's features were taken, see `ModelConfig`.
        curve: of the training.
        training: how it was trained, for people.
    """
    card = {
        **_origin(info, intermediate_features),
        "method": method,
        "rows": module.shape.rows,
        "width": module.shape.width,
        "curve": [[each.step, each.loss] for each in curve],
        "training": dict(training),
    }
    # One entry, because safetensors writes several in any order.
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, file, {_METADATA: json.dumps(card, sort_keys=True)})


def methods_of(files: Sequence[Path]) -> tuple[str, ...]:
    """Which policies these files are for.

    Raises:
        CheckpointError: one cannot be read or is no such file, or two are for the same policy.
    """
    methods = [_read(file)[0]["method"] for file in files]
    for file, method in zip(files, methods, strict=True):
        if methods.count(method) > 1:
            raise CheckpointError(f"compressor {file}: another file is for {method}, too; name one of them")
    return tuple(methods)


def load_trained_files(files: Sequence[Path], info: ModelInfo, intermediate_features: str) -> dict[str, Trained]:
    """Read several files; see `load_trained`. By the policies' names."""
    return {
        method: load_trained(file, info, intermediate_features)
        for file, method in zip(files, methods_of(files), strict=True)
    }


def load_trained(file: Path, info: ModelInfo, intermediate_features: str) -> Trained:
    """Read what a policy has learned.

    Args:
        file: that `save_trained` wrote.
        info: of the model.
        intermediate_features: where its features are taken.
    Returns:
        The module, on the model's device and frozen.
    Raises:
        CheckpointError: no such file, truncated, another model's, rows that its tensors do not have, or weights that
            are not finite.
    """
    card, tensors = _read(file)
    wanted = _origin(info, intermediate_features)
    for name in ("model_revision", "intermediate_features"):
        if card.get(name) != wanted[name]:
            trained_for = f"{card.get('model_id')} with {name} {card.get(name)}"
            raise CheckpointError(f"compressor {file}: was trained for {trained_for}, the model has {wanted[name]}")
    if card.get("width") != info.hidden_size:
        raise CheckpointError(f"compressor {file}: width must be {info.hidden_size}, got {card.get('width')}")
    try:
        module = trainable()[card["method"]](shape_of(info, card["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"compressor {file}: rows {error}") from error
    _fill(file, module, tensors)
    return module.to(info.device).requires_grad_(requires_grad=False)


def _fill(file: Path, module: Trained, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [None if each is None else [*each.shape] for each in (own.get(name), tensors.get(name))]
        if shapes[0] != shapes[1]:
            rows = module.shape.rows
            raise CheckpointError(f"compressor {file}: {name} must be {shapes[0]} for {rows} rows, got {shapes[1]}")
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"compressor {file}: {name} must be finite")
    module.load_state_dict(tensors)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as content:
            card = json.loads((content.metadata() or {}).get(_METADATA, "null"))
            names = content.keys()
            tensors = {name: content.get_tensor(name).to(torch.float32) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"compressor {file}: cannot be read: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("method"), str):
        raise CheckpointError(f"compressor {file}: not one; `trimserve train-compressor` writes them")
    if card["method"] not in trainable():
        known = ", ".join(trainable())
        raise CheckpointError(f"compressor {file}: method must be among {known}, got {card['method']!r}")
    return card, tensors


def _origin(info: ModelInfo, intermediate_features: str) -> dict[str, str]:
    return {
        "model_id": info.model_id,
        "model_revision": info.revision,
        "intermediate_features": intermediate_features,
    }
