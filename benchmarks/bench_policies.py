"""Times what every policy takes to choose from an image of four tiles.

    python -m benchmarks.bench_policies [--bench-model DIR] [--runs 5] [--threads 1] [--out FILE]

Twice: alone, on random features of Llama-3.2-Vision 11B's shape, where one call is timed with what it held in memory;
and as a share of the whole prefill of a question about a new image, vision encoder included, on the model `bench`
(`benchmarks.bench_model` writes it). Every policy keeps a fifth of the image. The last line is the JSON document.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.bench_model import BENCH_MODEL, write_bench_model
from benchmarks.ops.measure import peak_extra_bytes
from benchmarks.serve.report import about, write_json
from benchmarks.serve.workload import draw_picture
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.kv_pool import KVPool
from trimserve.models.encoded_image import EncodedImage, Observation
from trimserve.models.interruptible import run_through
from trimserve.models.loading import load_model
from trimserve.models.mllama import Mllama
from trimserve.models.policies.budget import Allowance, FixedRatio
from trimserve.models.policies.policy import AfterFirstLayer, BeforeDecoder, FirstLayer, Policy
from trimserve.models.policies.table import POLICIES
from trimserve.models.prefilled import Prefilled
from trimserve.models.prepared import PreparedPrompt
from trimserve.models.prompt import ChatPrompt, Image, Message, Text
from trimserve.models.trimming import TrimParams, scratch_bytes

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "policies" / "speed.json"
_KEEP = 0.2
_TILES, _SIZE, _DIM = 4, 1601, 4096
_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 32, 8, 128
_VISION_LAYERS, _VISION_HEADS, _VISION_HEAD_DIM = 40, 16, 80
_FEATURES = _TILES * _SIZE
_GEOMETRY: Final = {"tiles": _TILES, "F": _SIZE, "N": _FEATURES, "D": _DIM, "T": _ROWS, "keep": _KEEP}
_QUESTION = "Describe what you see in a few words, and name every colour."
_POOL_BYTES = 2**28


def main() -> None:
    """Time, write, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-model", type=Path, default=BENCH_MODEL, help="folder; written when it is not there")
    parser.add_argument("--runs", type=int, default=5, help="of each policy, at least 1; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="of one op")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.bench_model.exists():
        write_bench_model(arguments.bench_model)
    model = load_model(ModelConfig(model=str(arguments.bench_model)), EngineConfig())
    rows = []
    print(f"{'policy':12} {'11B: ms':>10} {'MiB':>6} {'bench: ms':>10} {'of prefill':>10}")
    for name, policy in POLICIES.items():
        rows.append({"policy": name, **_alone(policy(), arguments.runs), **_in_prefill(model, policy, arguments.runs)})
        print(_line(rows[-1]), flush=True)
    document = {
        "benchmark": "policies",
        **about(arguments.threads),
        "geometry": _GEOMETRY,
        "scratch_bytes": scratch_bytes(_TILES, _SIZE, _DIM),
        "policies": rows,
    }
    write_json(document, arguments.out)
    print(json.dumps(document))


@torch.inference_mode()
def _alone(policy: Policy, runs: int) -> dict[str, Any]:
    """Seconds of one choice at 11B's shape, scores of the heads included, and what it held meanwhile."""
    choose = _chooser(policy)
    seconds = []
    for _ in range(runs):
        started_at = perf_counter()
        choose()
        seconds.append(perf_counter() - started_at)
    return {"seconds": round(median(seconds), 5), "peak_extra_bytes": peak_extra_bytes(choose)}


def _chooser(policy: Policy) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features, allowance = draw(_FEATURES, _DIM), Allowance(FixedRatio(_KEEP))
    if isinstance(policy, BeforeDecoder):
        observed: dict[Observation, Tensor] = {
            "class_attention": draw(_VISION_LAYERS, _FEATURES).softmax(dim=1),
            "vision_attention": draw(2, _FEATURES, _VISION_HEADS, _VISION_HEAD_DIM),
            "patch_entropy": draw(_FEATURES).abs(),
        }
        image = EncodedImage(features, _SIZE, _VISION_LAYERS, observed)
        return lambda: policy.choose(image, allowance).kept
    assert isinstance(policy, AfterFirstLayer)
    queries, keys = draw(_ROWS, _HEADS, _HEAD_DIM), draw(_FEATURES, _KV_HEADS, _HEAD_DIM)
    visibility = torch.tensor([[0, _FEATURES]] * _ROWS, dtype=torch.int32)

    def choose() -> Tensor:
        layer = FirstLayer(queries, keys, features, visibility, _HEAD_DIM**-0.5, (_FEATURES,), _SIZE)
        return policy.choose(layer.images()[0], allowance).kept

    return choose


def _in_prefill(model: Mllama, policy: type[Policy], runs: int) -> dict[str, Any]:
    """Seconds from the scores to the kept set within a prefill on `bench`, and their share of all of it."""
    trim = TrimParams(policy=policy.name, budget=FixedRatio(_KEEP) if policy.budgets else None)
    pool = KVPool(model.info, _POOL_BYTES)
    whole, choosing = [], []
    for prompt in _prompts(model, runs):
        kv = pool.allocate(len(prompt.token_ids))
        started_at = perf_counter()
        images = [run_through(model.encode_image(image, trim.needs)) for image in prompt.images]
        prefilled: Prefilled = run_through(model.prefill(prompt, images, trim, kv))
        whole.append(perf_counter() - started_at)
        kv.release()
        assert prefilled.trim_times is not None
        choosing.append(prefilled.trim_times.selected_at - prefilled.trim_times.began_at)
    return {
        "bench_seconds": round(median(choosing), 5),
        "bench_prefill_seconds": round(median(whole), 5),
        "share_of_prefill": round(median(choosing) / median(whole), 5),
    }


def _prompts(model: Mllama, number: int) -> Iterator[PreparedPrompt]:
    """The question about one new image of four tiles after another."""
    for seed in range(number):
        image = Image(draw_picture(Random(seed), 2 * model.info.tile_size))
        yield model.prepare(ChatPrompt((Message("user", (image, Text(_QUESTION))),)))


def _line(row: dict[str, Any]) -> str:
    held = "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}"
    return (
        f"{row['policy']:12} {1e3 * row['seconds']:10.1f} {held:>6} {1e3 * row['bench_seconds']:10.1f} "
        f"{row['share_of_prefill']:10.2%}"
    )


if __name__ == "__main__":
    main()
