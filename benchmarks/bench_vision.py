"""Times a layer of the vision encoder against transformers' at the geometry of Llama-3.2-Vision 11B.

    python -m benchmarks.bench_vision [--runs 3] [--threads 1 2] [--out FILE]

One image of one tile and one of four; the weights are random. Compares outputs first, then times the two in turn. The
last line of standard output is one JSON document, which is written to a file, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaVisionEncoderLayer,
    _prepare_aspect_ratio_attention_mask,
)

from benchmarks.serve.report import about, write_json
from trimserve.models.vision import ImageRows, VisionLayer
from trimserve.models.vision_observer import VisionObserver
from trimserve.models.weights import FUSED, fuse

__all__ = ["main"]

_TILES, _PATCHES, _ROWS = 4, 1601, 1608
_MOST_DIFFERENCE = 1e-5


def main() -> None:
    """Compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed calls of each layer, at least 2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vision.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        layer = _layer()
        tiles = torch.randn(_TILES, _ROWS, layer.hidden_size)
        results = []
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for num_tiles in (1, _TILES):
                results.append(
                    {"threads": threads, "tiles": num_tiles, **_measure(layer, tiles, num_tiles, arguments.runs)}
                )
                print(results[-1], flush=True)
    geometry = {"width": layer.hidden_size, "heads": layer.num_attention_heads, "rows": _TILES * _ROWS}
    document = {"benchmark": "vision", **about(max(arguments.threads)), "geometry": geometry, "results": results}
    write_json(document, arguments.out)
    print(json.dumps(document))


def _layer() -> MllamaVisionEncoderLayer:
    """A layer with weights that matter: outputs of every linear layer have a standard deviation of about 1."""
    config = MllamaVisionConfig()
    config._attn_implementation = "sdpa"
    layer = MllamaVisionEncoderLayer(config, is_gated=True).eval()
    fuse(layer.self_attn, FUSED["self_attn"], torch.device("cpu"))
    for parameter in layer.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return layer


def _measure(layer: MllamaVisionEncoderLayer, tiles: Tensor, num_tiles: int, runs: int) -> dict[str, Any]:
    is_padding = torch.ones(_TILES, _ROWS, dtype=torch.bool)
    is_padding[:num_tiles, :_PATCHES] = False
    order = is_padding.flatten().argsort(stable=True)
    real_first, rows = tiles.flatten(0, 1)[order], tiles.flatten(0, 1)[None]
    mask = _prepare_aspect_ratio_attention_mask(
        (torch.arange(_TILES) < num_tiles)[None].float(), _PATCHES, _ROWS, torch.float32
    )
    ours = VisionLayer(layer)
    image = ImageRows(num_tiles * _PATCHES, VisionObserver(frozenset(), num_tiles, _PATCHES, 1))
    calls: list[Callable[[], Tensor]] = [
        lambda: ours(real_first, [image]),
        lambda: layer(rows, attention_mask=mask),
    ]
    found, expected = (call() for call in calls)
    difference = (found - expected[0, order]).abs().max().item()
    assert difference <= _MOST_DIFFERENCE, difference
    samples: list[list[float]] = [[], []]
    for _ in range(runs):
        for call, seconds in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    our_seconds, their_seconds = (statistics.median(seconds) for seconds in samples)
    return {
        "seconds": round(our_seconds, 3),
        "transformers_seconds": round(their_seconds, 3),
        "speedup": round(their_seconds / our_seconds, 2),
        "largest_difference": difference,
    }


if __name__ == "__main__":
    main()
