"""Finds a checkpoint and reads its small files; refuses by name what cannot be honoured. Of weights, only headers.

Only JSON is read here and only safetensors in `weights.py`: no code of a checkpoint is run.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from transformers import MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

import trimserve
from trimserve.errors import CheckpointError
from trimserve.model.formats.table import check_method
from trimserve.model.geometry import check_geometry
from trimserve.model.hub import snapshot
from trimserve.model.json_object import read_json
from trimserve.model.stored_tensors import StoredTensor, has_weights, stored_tensors, weights_file
from trimserve.validation import complaint

__all__ = [
    "EMBEDDED_MODEL",
    "Checkpoint",
    "GenerationJson",
    "TrimserveJson",
    "embedded_model_folder",
    "open_checkpoint",
    "text_config",
    "vision_config",
]

EMBEDDED_MODEL = "trimserve-tiny"
"""Name of the model that the package ships; what `--model` means when it is not given."""

_SMALL_FILES = ("*.json", "*.jinja")
_HASHED_BYTES = 1 << 20
_UINT32 = 2**32 - 1
_COMPUTED_IN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


_FOLLOWED_BY_TRANSFORMERS: Final = (
    *("bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "exponential_decay_length_penalty", "force_words_ids", "forced_eos_token_id"),
    *("guidance_scale", "max_length", "max_time", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "penalty_alpha", "sequence_bias", "stop_strings", "suppress_tokens", "token_healing"),
    "watermarking_config",
)
"""Settings that change what transformers generates, and nothing here.

`forced_bos_token_id` is not among them: transformers follows it after a prompt of a single token only.
"""

_FOLLOWED_IN_SAMPLING: Final = ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")
"""The same, where `do_sample` is true."""

_OFF: Final = {
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "num_return_sequences"), 1),
    "typical_p": 1,
    "max_length": 20,
}
"""Values that ask for nothing, beside 0, false and what is empty; older releases saved them all in `config.json`."""


class GenerationJson(BaseModel, extra="allow"):
    """What trimserve reads of `Checkpoint.generation_file`; null is the same as not there."""

    do_sample: bool = False
    """Without it generation is greedy, whatever the filters say."""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=_UINT32)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    max_new_tokens: int | None = Field(None, ge=1, le=_UINT32)
    eos_token_id: int | list[int] | None = None

    @property
    def without_effect(self) -> Mapping[str, Any]:
        """Settings that transformers follows and trimserve does not, where they ask for something."""
        names = {*_FOLLOWED_BY_TRANSFORMERS, *(_FOLLOWED_IN_SAMPLING if self.do_sample else ())}
        if self.max_new_tokens is not None:
            names.remove("max_length")  # which gives way
        found = {name: value for name, value in (self.model_extra or {}).items() if name in names and value}
        return {name: value for name, value in found.items() if value != _OFF.get(name)}


class TrimserveJson(BaseModel):
    """What trimserve reads of `trimserve.json`, a file of its own that a checkpoint may have."""

    k_ratio: float = Field(0.2, gt=0, le=1)
    """Recommended budget per head."""
    merge_ratio: float = Field(0.0, ge=0, le=1)
    """Recommended share of a tile's features to merge the others into; without it they are dropped, as in the paper."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The small files of a checkpoint, checked."""

    model_id: str
    """Hub id, or name of the folder."""
    revision: str
    """Commit hash of a hub checkpoint, content hash of a folder."""
    folder: Path
    config: MllamaConfig
    generation: GenerationJson
    trimserve: TrimserveJson
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """What the weight files hold, if something has to be known of them: a dtype that the config does not name, or which
    layers are quantized. Empty for a hub checkpoint that was not downloaded."""

    @property
    def generation_file(self) -> Path:
        """What says how to generate: `generation_config.json`, else `config.json`, as older releases saved it."""
        return _generation_file(self.folder)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a knob names; `auto` is the checkpoint's own.

        That is what the config names at its top, else what its parts name, else that of the first floats in the files.

        Raises:
            CheckpointError: the checkpoint's own is none that trimserve computes in.
        """
        own = next(filter(None, self._own_dtypes()), torch.float32)
        dtype = own if name == "auto" else getattr(torch, name)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{self.folder}: dtype must be float32, bfloat16 or float16, got {dtype}")
        return dtype

    def _own_dtypes(self) -> Iterator[torch.dtype | None]:
        yield from _named_dtypes(self.config)
        for name, tensor in self.tensors.items():
            if name.endswith(".weight"):  # not the scale of one
                yield _COMPUTED_IN.get(tensor.dtype)


def embedded_model_folder() -> Path:
    """Where the embedded model lies."""
    return Path(trimserve.__file__).parent / "assets" / EMBEDDED_MODEL


def open_checkpoint(model: str | None, revision: str | None, *, with_weights: bool) -> Checkpoint:
    """Find a checkpoint and read its small files.

    Args:
        model: folder or hub id; None is the embedded model.
        revision: branch, tag or commit of a hub checkpoint.
        with_weights: whether a hub checkpoint's weights are wanted too.
    Raises:
        CheckpointError: not found, not an Mllama, a file that makes no sense, or something that cannot be honoured
            (a quantization, an adapter).
    """
    folder, model_id, found_revision = _locate(model or EMBEDDED_MODEL, revision, with_weights)
    config = _read_config(folder)
    needs_headers = not any(_named_dtypes(config)) or getattr(config, "quantization_config", None)
    return Checkpoint(
        model_id=model_id,
        revision=found_revision,
        folder=folder,
        config=config,
        generation=_generation(folder),
        trimserve=_trimserve(folder),
        tensors=stored_tensors(folder) if needs_headers and has_weights(folder) else {},
    )


def text_config(config: MllamaConfig) -> MllamaTextConfig:
    """The decoder's part of a config, which transformers types as anything."""
    assert isinstance(config.text_config, MllamaTextConfig)
    return config.text_config


def vision_config(config: MllamaConfig) -> MllamaVisionConfig:
    """The vision encoder's part of a config."""
    assert isinstance(config.vision_config, MllamaVisionConfig)
    return config.vision_config


def _named_dtypes(config: MllamaConfig) -> tuple[torch.dtype | None, ...]:
    """The dtypes that a config and its parts name, where they do."""
    dtypes = (part.dtype for part in (config, text_config(config), vision_config(config)))
    return tuple(dtype if isinstance(dtype, torch.dtype) else None for dtype in dtypes)


def _locate(model: str, revision: str | None, with_weights: bool) -> tuple[Path, str, str]:
    """Folder, id and revision of a checkpoint."""
    try:
        folder = embedded_model_folder() if model == EMBEDDED_MODEL else Path(model).expanduser()
    except RuntimeError as error:  # nobody has that name, or the process has no home
        raise CheckpointError(f"{model}: no such folder: {error}") from error
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision}: {folder} is a folder; only hub models have revisions")
        name = os.fsencode(folder.resolve().name).decode(errors="replace")  # of any bytes, but messages are UTF-8
        return folder, name, _content_hash(folder)
    if model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such folder")
    patterns = [*_SMALL_FILES, "*.safetensors"] if with_weights else [*_SMALL_FILES]
    found = snapshot(model, revision, patterns)
    return found, model, found.name


def _content_hash(folder: Path) -> str:
    """Tells two folders apart: names, sizes, and both ends of each file."""
    digest = hashlib.sha256()
    patterns = (*_SMALL_FILES, "*.safetensors")
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        try:
            size = file.stat().st_size
            digest.update(os.fsencode(f"{file.name}:{size}"))
            with file.open("rb") as stream:
                digest.update(stream.read(_HASHED_BYTES))
                stream.seek(max(0, size - _HASHED_BYTES))
                digest.update(stream.read())
        except OSError as error:  # such as a link into a cache that was not copied along
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


Json = TypeVar("Json", bound=BaseModel)


def _generation_file(folder: Path) -> Path:
    file = folder / "generation_config.json"
    return file if file.exists() else folder / "config.json"


def _generation(folder: Path) -> GenerationJson:
    """What is said at the top of `config.json` goes before what its decoder's part says."""
    file = _generation_file(folder)
    content = read_json(file)
    of_decoder = content.get("text_config") if file.name == "config.json" else None
    return _validated(GenerationJson, file, (of_decoder or {}) | _without_null(content))


def _trimserve(folder: Path) -> TrimserveJson:
    file = folder / "trimserve.json"
    return _validated(TrimserveJson, file, read_json(file) if file.exists() else {})


def _without_null(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


def _validated(schema: type[Json], file: Path, content: Mapping[str, Any]) -> Json:
    try:
        return schema.model_validate(_without_null(content))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {field}: {complaint(first)}") from error


def _why_no_config(folder: Path) -> str:
    """What a folder without `config.json` is, and what to take instead if it is Meta's."""
    of_meta = [*sorted(folder.glob("consolidated*.pth")), folder / "params.json"]
    if not of_meta[0].exists():
        return "no config.json"
    return (
        f"{of_meta[0].name} is Meta's own format, with weights in a pickle, which is never read: take the safetensors "
        "of the same model (a hub repository that has this as its folder original/ has them beside that folder)"
    )


def _read_config(folder: Path) -> MllamaConfig:
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        what_to_take = f"take the model that it was trained on, with --adapter NAME={folder}, or merge it"
        raise CheckpointError(f"{folder}: adapter_config.json makes it an adapter: {what_to_take}")
    if not file.exists():
        raise CheckpointError(f"{folder}: {_why_no_config(folder)}")
    raw = read_json(file)
    if raw.get("model_type") != "mllama":
        raise CheckpointError(f"{folder}: model_type must be mllama, got {raw.get('model_type')}")
    check_method(file, raw.get("quantization_config"))
    read = weights_file(folder)
    if (weights := raw.get("transformers_weights")) not in (None, read):
        raise CheckpointError(f"{file}: transformers_weights must be {read}, if anything, got {weights}")
    try:
        config = MllamaConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever it meets in a broken file
        raise CheckpointError(f"{file}: {error}") from error
    config.name_or_path = str(folder)  # which errors name
    if (activation := text_config(config).hidden_act) != "silu":
        raise CheckpointError(f"{file}: text_config.hidden_act must be silu, got {activation}")
    vision = vision_config(config)
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        sides = f"{vision.image_size} and {vision.patch_size}"
        raise CheckpointError(f"{file}: image_size and patch_size must be the side of a square, got {sides}")
    check_geometry(file, config)
    expected = [list(ratio) for ratio in get_all_supported_aspect_ratios(vision.max_num_tiles)]
    if vision.supported_aspect_ratios != expected:
        raise CheckpointError(
            f"{file}: supported_aspect_ratios must be those of the image processor for "
            f"{vision.max_num_tiles} tiles, {expected}, got {vision.supported_aspect_ratios}"
        )
    return config
