"""Writes `bench`, a model to measure with: random weights, real image geometry, and small enough for a CPU.

    python -m benchmarks.bench_model --out out/bench-model

Tiles are 560 pixels wide and have 1601 visual features each, as in the 11B model; the decoder is ten layers deep. Its
text makes no sense, but it costs what a model of that shape costs. Gates are open and weights are scaled so that
logits vary and depend on the image. Equal seeds give equal weights. The checkpoint takes 780 MB and is not to be
committed.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration

from trimserve.model.loading import embedded_model_folder

__all__ = [
    "BENCH_MODEL",
    "GEOMETRY",
    "draw_parameter",
    "draw_weights",
    "main",
    "max_kept_fraction",
    "write_bench_model",
    "write_small_files",
]

GEOMETRY = Path(__file__).with_name("bench_geometry.json")
"""Shape of the model, and how it is to be trimmed."""

BENCH_MODEL = Path("out/bench-model")
"""Where benchmarks look for the checkpoint when nobody says otherwise."""

_GATE = 0.5
_IMAGE_TOKEN = "<|image|>"
_COPIED = ("chat_template.jinja", "tokenizer_config.json")
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def max_kept_fraction() -> float:
    """The cap that goes with `bench`: its random heads agree on nothing, so their union would be nearly everything."""
    fraction: float = _read(GEOMETRY)["trim"]["max_kept_fraction"]
    return fraction


def write_bench_model(folder: Path, geometry: dict[str, Any] | None = None, seed: int = 0) -> None:
    """Write the checkpoint as `MllamaForConditionalGeneration.from_pretrained` and `trimserve serve` read it.

    Args:
        folder: made if it is not there.
        geometry: as in `GEOMETRY`, which is the default; its vocabulary holds the embedded model's.
        seed: of the weights.
    """
    geometry = geometry or _read(GEOMETRY)
    write_small_files(folder, geometry)
    _random_model(geometry, _read(embedded_model_folder() / "generation_config.json"), seed).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone


def write_small_files(folder: Path, geometry: dict[str, Any]) -> None:
    """Write tokenizer, processor and trimming of a checkpoint, whose folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    source = embedded_model_folder()
    for name in _COPIED:
        shutil.copy(source / name, folder / name)
    vision = geometry["vision_config"]
    for name in _IMAGE_PROCESSORS:
        document = _read(source / name)
        processor = document.get("image_processor", document)
        processor["size"] = {"height": vision["image_size"], "width": vision["image_size"]}
        processor["max_image_tiles"] = vision["max_num_tiles"]
        _write(folder / name, document)
    vocab_size = geometry["text_config"]["vocab_size"]
    _write(folder / "tokenizer.json", _enlarged(_read(source / "tokenizer.json"), vocab_size))
    _write(folder / "trimserve.json", {"k_ratio": geometry["trim"]["k_ratio"]})


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
    letters = ""
    for _ in range(4):
        index, letter = divmod(index, 26)
        letters += chr(ord("a") + letter)
    return f"Ġq{letters}"  # Ġ is a space in byte-level vocabularies


def _random_model(geometry: dict[str, Any], generation: dict[str, Any], seed: int) -> MllamaForConditionalGeneration:
    special = {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = geometry["text_config"]
    config = MllamaConfig(
        vision_config=geometry["vision_config"],
        text_config={**text, **special},
        image_token_index=text["vocab_size"],
        dtype="float32",
    )
    with torch.device("meta"):  # transformers' own initial values would be drawn in vain
        model = MllamaForConditionalGeneration(config)
    model.to_empty(device="cpu")
    model.generation_config = GenerationConfig(**special, do_sample=False, max_new_tokens=generation["max_new_tokens"])
    draw_weights(model, seed)
    return model


def draw_weights(model: MllamaForConditionalGeneration, seed: int = 0) -> None:
    """Give every parameter values, on its device; equal seeds give equal ones on equal devices."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw_parameter(name, parameter, generator)


def draw_parameter(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Give one parameter its values."""
    if "gate" in name.rsplit(".", 1)[-1]:
        parameter.fill_(_GATE)
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


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH_MODEL, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    write_bench_model(arguments.out, seed=arguments.seed)
    print(arguments.out)


if __name__ == "__main__":
    main()
