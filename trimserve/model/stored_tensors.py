"""The tensors of a checkpoint folder: in which safetensors file each lies, under which name, and parts of them.

Files are chosen as transformers chooses them: `model.safetensors`, else the shards that the index names. Only headers
are read here, and slices on demand; what a tensor is for is not known.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimserve.errors import CheckpointError
from trimserve.model.json_object import read_json

__all__ = ["StoredTensor", "current_name", "has_weights", "row_slices", "stored_tensors", "weights_file"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_SLICE_BYTES = 8 << 20

# What transformers 4.52 renamed, Meta's names among them, and the model saved without its output layer.
_CURRENT_NAMES = (
    (re.compile(r"(model\.)?(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"(model\.)?language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"(model\.)?(vision_model|multi_modal_projector)\."), r"model.\2."),
)

# Computed from the config wherever the model is built; older releases saved them nevertheless.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids)$")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, such as `BF16`."""

    def __str__(self) -> str:
        """How messages name it."""
        return f"{self.file}: {self.name}"

    def read(self, *part: slice) -> Tensor:
        """Read a part of the tensor; without one, all of it.

        The file is mapped for this call only, so that what was read does not stay resident.

        Args:
            part: of each dimension, from the first on.
        """
        with safe_open(self.file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_slice(self.name)[part] if part else tensors.get_tensor(self.name)
        return tensor

    def equals(self, other: "StoredTensor") -> bool:
        """Whether another tensor has the same dtype, shape and numbers."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if not self.shape:
            return torch.equal(self.read(), other.read())
        return all(torch.equal(self.read(part), other.read(part)) for part in row_slices(self.shape))


def row_slices(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Slices of the first dimension of a shape, each of some megabytes as float32.

    Args:
        shape: at least one dimension.
        multiple: where slices begin.
    """
    row_bytes = torch.float32.itemsize
    for size in shape[1:]:
        row_bytes *= size
    step = max(1, _SLICE_BYTES // max(1, row_bytes) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights and not only the small files of a checkpoint."""
    return any(folder.glob("*.safetensors"))


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Find the tensors of a checkpoint by their current names; buffers that are computed are left out.

    A tensor may be in two files, or under an old and a new name, if it is the same in both.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
    Raises:
        CheckpointError: no safetensors files, shards that are missing or have no index, a broken or incomplete file,
            or a tensor that differs between two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        for tensor in _header(file):
            if _COMPUTED.search(tensor.name):
                continue
            name = current_name(tensor.name)
            before = tensors.setdefault(name, tensor)
            if before is not tensor and not before.equals(tensor):
                raise CheckpointError(f"{tensor}: differs from {before.name} in {before.file.name}")
    return tensors


def weights_file(folder: Path) -> str:
    """Name of the file that a checkpoint's weights are found by: all of them, or an index of shards."""
    return _WHOLE if (folder / _WHOLE).exists() or not (folder / _INDEX).exists() else _INDEX


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _WHOLE).exists():
        return [folder / _WHOLE]
    if not index.exists():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if others:
            found = f"{others[0]} and {len(others) - 1} others" if len(others) > 1 else others[0]
            raise CheckpointError(f"{folder}: has {found}, but neither {_WHOLE} nor {_INDEX}, which would name them")
        raise CheckpointError(f"{folder}: no {_WHOLE}; only safetensors checkpoints are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: must have an object weight_map")
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: names {missing[0]}, which is not there ({len(missing)} of {len(names)} files)")
    return [folder / name for name in names]


def _header(file: Path) -> list[StoredTensor]:
    found = []
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                found.append(StoredTensor(file, name, tuple(part.get_shape()), str(part.get_dtype())))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
    return found


def current_name(name: str) -> str:
    """What transformers calls a tensor today.

    Args:
        name: of today, or before transformers 4.52.
    """
    for pattern, current in _CURRENT_NAMES:
        if match := pattern.match(name):
            return match.expand(current) + name[match.end() :]
    return name
