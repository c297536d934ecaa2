"""The models that are measured: the embedded one, `bench`, and one as large as Llama-3.2-Vision 11B.

`bench` has random weights and is small enough for a CPU: tiles are 560 pixels wide and have 1601 visual features each,
as in the 11B model; the decoder is ten layers deep. The large one has the 11B model's geometry and vocabulary. Their
text makes no sense, but costs what a model of that shape costs. Gates are open and weights are scaled so that logits
vary and depend on the image. Equal seeds give equal weights. Neither is to be committed: they take 780 MB and 20 GiB.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration

from benchmarks.report import write_json
from trimserve.model.checkpoint import text_config, vision_config
from trimserve.model.json_object import read_json
from trimserve.model.loading import embedded_model_folder
from trimserve.model.transformers_mllama import meta_model
from trimserve.v1 import generation_pb2 as pb

__all__ = [
    "BENCH_MODEL",
    "GEOMETRY",
    "MODELS",
    "REAL_SIZE_MODEL",
    "ROPE",
    "UnderTest",
    "bench_model",
    "draw_weights",
    "max_kept_fraction",
    "under_test",
    "write_real_size_model",
]

MODELS: Final = ("embedded", "bench")

GEOMETRY: Final = Path(__file__).with_name("bench_geometry.json")
"""Shape of `bench`, and how it is to be trimmed."""

BENCH_MODEL: Final = Path("out/bench-model")
REAL_SIZE_MODEL: Final = Path("out/real-size-model")
"""Where benchmarks look for the checkpoints when nobody says otherwise."""

_IMAGE_TOKEN: Final = "<|image|>"
_SHARD_BYTES: Final = 2 << 30
ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How the 11B model's positions are scaled."""

_REAL_SIZE: Final = {"text_config": {"rope_parameters": ROPE}, "vision_config": {}, "trim": {"k_ratio": 0.2}}
"""For the rest transformers' defaults are the 11B model's."""


@dataclass(frozen=True, slots=True)
class UnderTest:
    """A model, and how it is trimmed."""

    name: str
    checkpoint: Path
    max_kept_fraction: float | None
    """Cap of every trimmed request; None: none."""

    def trim(self, *, is_on: bool) -> pb.TrimOptions:
        """What a request says: the checkpoint's own budget, or off."""
        if not is_on:
            return pb.TrimOptions(mode=pb.TRIM_MODE_OFF)
        return pb.TrimOptions(mode=pb.TRIM_MODE_ON, max_kept_fraction=self.max_kept_fraction)


def under_test(name: str, folder: Path) -> UnderTest:
    """One of `MODELS`; `bench` is written to a folder if it is not there."""
    if name == "embedded":
        return UnderTest(name, embedded_model_folder(), None)
    return UnderTest(name, bench_model(folder), max_kept_fraction())


def max_kept_fraction() -> float:
    """The cap that goes with `bench`: its random heads agree on nothing, so their union would be nearly everything."""
    fraction: float = read_json(GEOMETRY)["trim"]["max_kept_fraction"]
    return fraction


def bench_model(folder: Path) -> Path:
    """The folder of `bench`, which is written if it is not there."""
    if not (folder / "config.json").exists():
        _write_model(folder, read_json(GEOMETRY), torch.float32, _SHARD_BYTES)
    return folder


def write_real_size_model(folder: Path, geometry: dict[str, Any] = _REAL_SIZE, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write the large checkpoint in bfloat16, a shard at a time, so that it takes little memory."""
    _write_model(folder, geometry, torch.bfloat16, shard_bytes)


def _write_model(folder: Path, geometry: dict[str, Any], dtype: torch.dtype, shard_bytes: int) -> None:
    generation = read_json(embedded_model_folder() / "generation_config.json")
    special = {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MllamaConfig(
        text_config={**geometry["text_config"], **special},
        vision_config=geometry["vision_config"],
        architectures=["MllamaForConditionalGeneration"],
        dtype=dtype,
    )
    config.image_token_index = text_config(config).vocab_size
    _write_small_files(folder, config, geometry["trim"]["k_ratio"])
    config.save_pretrained(folder)
    limit = generation["max_new_tokens"]
    GenerationConfig(**special, do_sample=False, max_new_tokens=limit).save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(_shards(config, dtype, shard_bytes), 1):
        name = f"model-{index:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    write_json({"metadata": {}, "weight_map": weight_map}, folder / "model.safetensors.index.json")


def _shards(config: MllamaConfig, dtype: torch.dtype, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, parameter in meta_model(config, dtype).named_parameters():
        if shard and sum(tensor.nbytes for tensor in shard.values()) + parameter.nbytes > shard_bytes:
            yield shard
            shard = {}
        weight = torch.empty(parameter.shape, dtype=dtype)
        _draw(name, weight, generator)
        shard[name] = weight
    yield shard


def draw_weights(model: MllamaForConditionalGeneration) -> None:
    """Give every parameter values, on its device; the same ones on equal devices."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, generator)


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if "gate" in name.rsplit(".", 1)[-1]:
        parameter.fill_(0.5)
    elif "norm" in name:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif name.endswith("bias"):
        parameter.normal_(0, 0.1, generator=generator)
    elif "lm_head" in name:  # logits of standard deviation 3: a distribution about as sharp as a trained one
        parameter.normal_(0, 3 * parameter.shape[1] ** -0.5, generator=generator)
    elif "embed" in name and "patch_embedding" not in name:
        parameter.normal_(0, 0.5, generator=generator)
    else:  # keeps the variance of what comes in
        parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def _write_small_files(folder: Path, config: MllamaConfig, k_ratio: float) -> None:
    """Tokenizer, processor and trimming of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    source, vision = embedded_model_folder(), vision_config(config)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        document = read_json(source / name)
        processor = document.get("image_processor", document)
        processor["size"] = {"height": vision.image_size, "width": vision.image_size}
        processor["max_image_tiles"] = vision.max_num_tiles
        write_json(document, folder / name)
    tokenizer = _enlarged(read_json(source / "tokenizer.json"), text_config(config).vocab_size)
    write_json(tokenizer, folder / "tokenizer.json")
    write_json({"k_ratio": k_ratio}, folder / "trimserve.json")


def _enlarged(tokenizer: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The embedded tokenizer with invented words up to a vocabulary's size, behind which `<|image|>` comes.

    All tokens keep their ids but `<|image|>`. It reads text as before, since no text has the invented words; they
    are there to be written.
    """
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if token["content"] == _IMAGE_TOKEN:
            token["id"] = vocab_size
        vocab[token["content"]] = token["id"]  # ids of added tokens that the vocabulary does not have are not kept
    taken = set(vocab.values())
    vocab |= {_invented_word(index): index for index in range(vocab_size) if index not in taken}
    return tokenizer


def _invented_word(index: int) -> str:
    letters = (chr(ord("a") + index // 26**place % 26) for place in range(4))
    return f"Ġq{''.join(letters)}"  # Ġ is a space in byte-level vocabularies
