"""Times vision encoder, prefill and decode steps at the 11B model's geometry on a GPU, beside transformers.

    python -m benchmarks.bench_gpu [--geometry 11b|bench] [--device cuda|cpu] [--seconds 1]

Both run on the same bfloat16 weights, drawn on the device: transformers with sdpa and Meta's semantics, whose cache
grows; trimserve with its decode steps as CUDA graphs. A prompt of random tokens about an image of four tiles is read
untrimmed (`off`) and trimmed (`default`), and about an image of one tile (`one_tile`), for which transformers takes as
long as for four. Heads of random weights agree on nothing, so `default` is capped at half of the features
(`max_kept_fraction`). Each sequence of a batch has pages of its own. The floor of a decode step is the bytes of
weights, keys and values that it reads over the bandwidth of reading, measured here.

Logits are compared first. Writes `gpu.json` after each row; the last line of standard output is the report.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MllamaConfig

from benchmarks.bench_model import GEOMETRY, draw_weights
from benchmarks.generate.ours import copied
from benchmarks.generate.timing import time_calls
from benchmarks.ops.measure import bandwidth
from benchmarks.serve.report import about, write_json
from benchmarks.transformers_step import cache_of, growing_step
from training.mended import mend
from trimserve.api.trim import TrimRequest
from trimserve.config import Device, EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.checkpoint import (
    Checkpoint,
    GenerationJson,
    TrimserveJson,
    embedded_model_folder,
    text_config,
    vision_config,
)
from trimserve.model.interruptible import run_through
from trimserve.model.loading import describe_checkpoint, describe_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedImage, PreparedPrompt
from trimserve.model.processor import Processor
from trimserve.model.weights import allocated_model
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

__all__ = ["Plan", "main", "measure"]

_OUT = Path(__file__).parent / "results"
_PROMPT_TOKENS = 64
_MAX_MODEL_LEN = 4096
_LEAST_COSINE = 0.99
"""Between both models' logits, of bfloat16 weights."""
_OF_STEP = ("model.language_model.layers", "model.language_model.norm", "lm_head")
_NOT_OF_STEP = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight", "cross_attn.k_norm.weight")

Row = dict[str, Any]
SETTINGS = {
    "off": (2, TrimPlan.of(TrimRequest(enabled=False))),
    "default": (2, TrimPlan.of(TrimRequest(k_ratio=0.2, max_kept_fraction=0.5))),
    "one_tile": (1, TrimPlan.of(TrimRequest(k_ratio=0.2, max_kept_fraction=0.5))),
}
"""Tiles along each side of the image, and how it is trimmed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how long."""

    config: MllamaConfig
    device: Device
    batches: Sequence[int] = (1, 4, 8, 16, 32)
    seconds: float = 1.0
    """Of every figure."""


class _Both:
    """One set of weights, run by trimserve and by transformers."""

    def __init__(self, plan: Plan) -> None:
        most_positions = min(_MAX_MODEL_LEN, text_config(plan.config).max_position_embeddings)
        knobs = ModelConfig(device=plan.device, dtype="bfloat16", max_model_len=most_positions)
        generation, trimming = GenerationJson.model_validate({}), TrimserveJson.model_validate({})
        checkpoint = Checkpoint("random", "0", Path(), plan.config, generation, trimming)
        info = describe_checkpoint(checkpoint, knobs, EngineConfig(max_images=1))
        self.theirs: Any = allocated_model(plan.config, torch.bfloat16, torch.device(info.device))
        draw_weights(self.theirs)
        # Prompts are drawn, too: no processor is asked, so the embedded model's stands in.
        embedded = describe_model(ModelConfig(), EngineConfig())
        processor = Processor.from_pretrained(
            embedded_model_folder(), embedded, template_date="", max_image_pixels=info.tile_size**2
        )
        self.ours = Mllama(self.theirs, processor, info)
        mend(self.theirs)
        most = max(plan.batches)
        features = info.max_tiles * info.features_per_tile * info.cross_kv_bytes_per_feature
        text = 2 * _PROMPT_TOKENS * info.self_kv_bytes_per_token
        self.pool = OwnPages(info, (most + 1) * (features + text) * 9 // 8)
        self.ours.warm_up_decode(self.pool.pages, most)
        self.weight_bytes = sum(
            parameter.nbytes
            for name, parameter in self.theirs.named_parameters()
            if name.startswith(_OF_STEP) and not name.endswith(_NOT_OF_STEP)
        )

    def prompt(self, side: int) -> PreparedPrompt:
        """An image of side * side tiles, then text."""
        info, generator = self.ours.info, torch.Generator().manual_seed(0)
        pixels = torch.zeros(info.max_tiles, 3, info.tile_size, info.tile_size)
        pixels[: side**2].normal_(generator=generator)
        ratios = vision_config(self.theirs.config).supported_aspect_ratios or []
        size = side * info.tile_size
        image = PreparedImage(pixels, ratios.index([side, side]) + 1, side, side, size, size, b"")
        text = torch.randint(info.vocab_size, (_PROMPT_TOKENS - 1,), generator=generator).tolist()
        return PreparedPrompt((info.image_token_id, *text), (image,))


@torch.inference_mode()
def measure(plan: Plan, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything but the machine.

    Args:
        plan: what, and how long.
        write: gets what is known after each row, so that a failure loses none.
    Raises:
        AssertionError: the logits of both models are not alike.
    """
    start = time.monotonic()
    both = _Both(plan)
    alike = _likeness(both)
    assert alike >= _LEAST_COSINE, f"the cosine of both models' logits is {alike}"
    with torch.device(both.ours.info.device):
        per_second = bandwidth("read", 15)
    rows: list[Row] = []
    report = {
        "max_kept_fraction": SETTINGS["default"][1].allowance.max_fraction,
        "read_bytes_per_second": round(per_second),
        "cosine_of_logits": round(alike, 5),
        "rows": rows,
    }
    for row in chain(_ours(both, plan, per_second), _theirs(both, plan)):
        rows.append(row)
        write(report)
    theirs = {(row["phase"], row["batch"]): row["ms"]["median"] for row in rows if row["engine"] == "transformers"}
    for row in rows:
        if row["engine"] == "trimserve":
            row["speedup"] = round(theirs[row["phase"], row["batch"]] / row["ms"]["median"], 2)
    return {"seconds": round(time.monotonic() - start, 1), **report}


def _likeness(both: _Both) -> float:
    prompt = both.prompt(2)
    logits, kv = _prefilled(both, prompt, TrimPlan.of(TrimRequest(enabled=False)))
    kv.release()
    inputs = _their_inputs(both, prompt)
    expected = _read(both, inputs, _encoded(both, inputs)).logits[0, -1]
    return float(F.cosine_similarity(logits.float(), expected.float(), dim=0))


def _ours(both: _Both, plan: Plan, per_second: float) -> Iterator[Row]:
    info = both.ours.info
    for name, (side, trim) in SETTINGS.items():
        prompt = both.prompt(side)
        [image] = prompt.images
        _, kv = _prefilled(both, prompt, trim)
        row = {"engine": "trimserve", "setting": name, "cross_rows": kv.cross_lengths[0]}
        taken = _timed(plan, partial(_encode, both, image))
        yield row | {"phase": "vision", "batch": 1, "ms": taken}
        encoded = [_encode(both, image)]

        def prefill(prompt: PreparedPrompt = prompt, encoded: Any = encoded, trim: TrimPlan = trim) -> None:
            kv = _granted(both, encoded)
            run_through(both.ours.prefill(prompt, encoded, trim, kv))
            kv.release()

        yield row | {"phase": "prefill", "batch": 1, "ms": _timed(plan, prefill)}
        kvs = [kv]
        of_one = (_PROMPT_TOKENS + 1) * info.self_kv_bytes_per_token
        of_one += kv.cross_lengths[0] * info.cross_kv_bytes_per_feature
        for batch in plan.batches:
            kvs += [copied(both.pool, kv, _PROMPT_TOKENS + 1) for _ in range(batch - len(kvs))]
            taken = _timed(plan, _step(both, kvs))
            floor = (both.weight_bytes + batch * of_one) / per_second * 1e3
            beside = {"floor_ms": round(floor, 3), "times_floor": round(taken["median"] / floor, 3)}
            yield row | {"phase": "decode", "batch": batch, "ms": taken, **beside}
        for each in kvs:
            each.release()


def _theirs(both: _Both, plan: Plan) -> Iterator[Row]:
    row = {"engine": "transformers", "setting": "off"}
    inputs = _their_inputs(both, both.prompt(2))
    yield row | {"phase": "vision", "batch": 1, "ms": _timed(plan, lambda: _encoded(both, inputs))}
    features = _encoded(both, inputs)
    yield row | {"phase": "prefill", "batch": 1, "ms": _timed(plan, lambda: _read(both, inputs, features))}
    cache = cache_of(_read(both, inputs, features))
    for batch in plan.batches:
        yield row | {"phase": "decode", "batch": batch, "ms": _timed(plan, _their_step(both, inputs, cache, batch))}


def _prefilled(both: _Both, prompt: PreparedPrompt, trim: TrimPlan) -> tuple[Tensor, OwnKeyValues]:
    encoded = [_encode(both, image) for image in prompt.images]
    kv = _granted(both, encoded)
    logits = run_through(both.ours.prefill(prompt, encoded, trim, kv)).logits
    kv.give_back_unused()
    return logits, kv


def _granted(both: _Both, images: Sequence[EncodedImage]) -> OwnKeyValues:
    return both.pool.key_values(_PROMPT_TOKENS + 1, sum(image.num_features for image in images))


def _encode(both: _Both, image: PreparedImage) -> EncodedImage:
    return run_through(both.ours.encode_image(image))


def _step(both: _Both, kvs: Sequence[OwnKeyValues]) -> Callable[[], Any]:
    batch = list(kvs)

    def run() -> list[int]:
        for kv in batch:
            kv.length = _PROMPT_TOKENS
        return cast("list[int]", both.ours.decode([5] * len(batch), batch).argmax(dim=-1).tolist())

    return run


def _their_inputs(both: _Both, prompt: PreparedPrompt) -> dict[str, Tensor]:
    device, max_tiles = both.theirs.device, both.ours.info.max_tiles
    [image] = prompt.images
    inputs = {
        "input_ids": torch.tensor([prompt.token_ids]),
        "attention_mask": torch.ones(1, _PROMPT_TOKENS, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, _PROMPT_TOKENS, 1, max_tiles, dtype=torch.int64),
        "pixel_values": image.pixel_values[None, None].to(torch.bfloat16),
        "aspect_ratio_ids": torch.tensor([[image.aspect_ratio_id]]),
        "aspect_ratio_mask": torch.ones(1, 1, max_tiles, dtype=torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _encoded(both: _Both, inputs: dict[str, Tensor]) -> Tensor:
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = both.theirs.model.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
    features: Tensor = both.theirs.model.multi_modal_projector(states)
    return features.reshape(-1, states.shape[-2], features.shape[-1])


def _read(both: _Both, inputs: dict[str, Tensor], features: Tensor) -> Any:
    names = ("input_ids", "attention_mask", "cross_attention_mask")
    chosen = {name: inputs[name] for name in names}
    return both.theirs(**chosen, cross_attention_states=features, use_cache=True, logits_to_keep=1)


def _their_step(both: _Both, inputs: dict[str, Tensor], cache: Any, batch: int) -> Callable[[], Any]:
    step = growing_step(both.theirs, inputs, cache, batch)
    return lambda: step()[:, -1].argmax(dim=-1).tolist()


def _timed(plan: Plan, call: Callable[[], Any]) -> dict[str, float]:
    def run() -> None:
        call()
        if plan.device == "cuda":
            torch.cuda.synchronize()

    return time_calls(run, plan.seconds)


def _config(geometry: str) -> MllamaConfig:
    """`11b` is what transformers takes where nothing is said, with the tiles of the instruction-tuned checkpoint."""
    if geometry == "11b":
        return MllamaConfig(vision_config={"image_size": 560}, image_token_index=128256)
    document = json.loads(GEOMETRY.read_text())
    text = document["text_config"]
    return MllamaConfig(vision_config=document["vision_config"], text_config=text, image_token_index=text["vocab_size"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=["11b", "bench"], default="11b", help="shape of the model")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to measure")
    parser.add_argument("--seconds", type=float, default=1.0, help="of every figure")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder of the report")
    arguments = parser.parse_args()
    is_gpu = arguments.device == "cuda"
    machine = {
        "benchmark": "gpu",
        **about(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if is_gpu else None,
        "model": arguments.geometry,
        "dtype": "bfloat16",
    }

    def write(measured: dict[str, Any]) -> None:
        write_json({**machine, **measured}, arguments.out / ("gpu.json" if is_gpu else "gpu_on_cpu.json"))

    measured = measure(Plan(_config(arguments.geometry), arguments.device, seconds=arguments.seconds), write)
    write(measured)
    print(json.dumps({**machine, **measured}))


if __name__ == "__main__":
    main()
