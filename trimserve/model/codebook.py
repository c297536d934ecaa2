"""A codebook: directions of features that say nothing, of one model. How they are found is not known here."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimserve.api.info import ModelInfo
from trimserve.errors import CheckpointError

__all__ = ["load_codebook", "save_codebook"]

_TENSOR = "prototypes"
_METADATA = "trimserve"


def save_codebook(file: Path, prototypes: Tensor, info: ModelInfo, intermediate_features: str) -> None:
    """Write a codebook; equal ones give equal bytes.

    Args:
        file: safetensors.
        prototypes: float32 [P, hidden_size], each of length 1.
        info: of the model whose features they are like.
        intermediate_features: where these were taken, see `ModelConfig`.
    """
    # One entry, because safetensors writes several in any order.
    metadata = {_METADATA: json.dumps(_origin(info, intermediate_features), sort_keys=True)}
    save_file({_TENSOR: prototypes.contiguous()}, file, metadata)


def load_codebook(file: Path, info: ModelInfo, intermediate_features: str) -> Tensor:
    """Read the codebook of a model.

    Args:
        file: that `save_codebook` wrote.
        info: of the model.
        intermediate_features: where its features are taken.
    Returns:
        float32 [P, hidden_size], each of length 1.
    Raises:
        CheckpointError: no such file, not a codebook, another model's, or numbers that are not finite.
    """
    try:
        with safe_open(file, framework="pt") as content:
            origin = json.loads((content.metadata() or {}).get(_METADATA, "null"))
            has_tensor = _TENSOR in content.keys()  # noqa: SIM118  # it is no mapping
            prototypes: Tensor | None = content.get_tensor(_TENSOR) if has_tensor else None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"codebook {file}: cannot be read: {error}") from error
    if prototypes is None or not isinstance(origin, dict):
        raise CheckpointError(f"codebook {file}: not one; `trimserve codebook build` writes them")
    wanted = _origin(info, intermediate_features)
    for name in ("model_revision", "intermediate_features"):
        if origin.get(name) != wanted[name]:
            built_for = f"{origin.get('model_id')} with {name} {origin.get(name)}"
            raise CheckpointError(f"codebook {file}: was built for {built_for}, the model has {wanted[name]}")
    if prototypes.ndim != 2 or prototypes.shape[1] != info.hidden_size or not len(prototypes):
        shape = list(prototypes.shape)
        raise CheckpointError(f"codebook {file}: must be [P, {info.hidden_size}], got {shape}")
    if not prototypes.isfinite().all():
        raise CheckpointError(f"codebook {file}: {_TENSOR} must be finite")
    return prototypes.to(info.device, torch.float32)


def _origin(info: ModelInfo, intermediate_features: str) -> dict[str, str]:
    return {
        "model_id": info.model_id,
        "model_revision": info.revision,
        "intermediate_features": intermediate_features,
    }
