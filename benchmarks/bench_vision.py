"""Times layers of the vision encoder: against transformers', and with several images in one pass.

    python -m benchmarks.bench_vision [--runs 3] [--layers 4] [--threads 1 2] [--out FILE]

Against transformers' at the geometry of Llama-3.2-Vision 11B, one image of one tile and one of four, in float32 and in
bfloat16; the ratio has the 95 % interval of the median of the pairs that were timed in turn. Several images in
one pass are the alternative that ADR-0007 rejects, so it lives here: their rows go through the linear layers together,
and each image attends to itself alone. It is timed at 11B's geometry and at that of the embedded model, whose layers
are so small that what each op costs beside its arithmetic matters most.

The weights are random. Compares outputs first, then times the calls in turn. The last line of standard output is one
JSON document, which is written to a file, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import reduce
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaVisionEncoderLayer,
    _prepare_aspect_ratio_attention_mask,
)

from benchmarks.bench_checkouts import interval
from benchmarks.serve.report import about, write_json
from trimserve.model.checkpoint import embedded_model_folder, vision_config
from trimserve.model.projection import Projection
from trimserve.model.transformers_mllama import vision_layer_parts
from trimserve.model.vision import ImageRows, VisionLayer
from trimserve.model.vision_observer import VisionObserver
from trimserve.model.weights import fuse

__all__ = ["main"]

_ROW_ALIGNMENT = 8
_MOST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Root mean square over outputs whose own is several; of bfloat16 what both sides' rounding comes to."""
_SMALL_RUNS = 100
"""As many times the runs for a layer that takes a millisecond."""


def main() -> None:
    """Compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed calls of each layer, at least 2")
    parser.add_argument("--layers", type=int, default=4, help="layers of the comparison with transformers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vision.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        large, *compared = (
            _Bench(MllamaVisionConfig(image_size=560), dtype, layers)
            for dtype, layers in (
                (torch.float32, 1),
                (torch.float32, arguments.layers),
                (torch.bfloat16, arguments.layers),
            )
        )
        small = _Bench(vision_config(MllamaConfig.from_pretrained(embedded_model_folder())))
        results, together = [], []
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for bench in compared:
                for num_tiles in (1, bench.max_tiles):
                    row = bench.beside_transformers(num_tiles, arguments.runs)
                    results.append({"threads": threads, "tiles": num_tiles, **row})
                    print(results[-1], flush=True)
            for name, bench, counts, runs in (
                ("11b", large, (1, 2), arguments.runs),
                ("embedded", small, (1, 2, 4), arguments.runs * _SMALL_RUNS),
            ):
                for row in bench.together(counts, runs):
                    together.append({"threads": threads, "geometry": name, **row})
                    print(together[-1], flush=True)
    document = {"benchmark": "vision", **about(max(arguments.threads)), "geometry": large.geometry}
    document |= {"results": results, "together": together}
    write_json(document, arguments.out)
    print(json.dumps(document))


class _Together(VisionLayer):
    """Several images in one pass: all rows through the linear layers at once, each image attends to itself alone."""

    num_rows: int
    """Of an image."""

    def attend(self, qkv: Tensor, image: ImageRows) -> Tensor:
        """The rows of images of the same size, one after another."""
        return torch.cat([super(_Together, self).attend(rows, image) for rows in qkv.split(self.num_rows)])


class _Bench:
    """Layers of some geometry, and the rows of an image."""

    def __init__(self, config: MllamaVisionConfig, dtype: torch.dtype = torch.float32, num_layers: int = 1) -> None:
        """Draw weights that matter: outputs of every linear layer have a standard deviation of about 1."""
        config._attn_implementation = "sdpa"
        self._dtype = dtype
        self._layers = [MllamaVisionEncoderLayer(config, is_gated=True).eval().to(dtype) for _ in range(num_layers)]
        for layer in self._layers:
            fuse(vision_layer_parts(layer).qkv, torch.device("cpu"))
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        self.max_tiles = config.max_num_tiles
        size, patch_size = config.image_size, config.patch_size
        assert isinstance(size, int)
        assert isinstance(patch_size, int)
        self._patches = (size // patch_size) ** 2 + 1
        rows = self._patches + -self._patches % _ROW_ALIGNMENT
        self._tiles = torch.randn(self.max_tiles, rows, config.hidden_size).to(dtype)
        self.geometry = {
            "width": config.hidden_size,
            "heads": config.attention_heads,
            "rows": self.max_tiles * rows,
        }

    def beside_transformers(self, num_tiles: int, runs: int) -> dict[str, Any]:
        """One image, our layers and transformers'."""
        is_padding = torch.ones(self._tiles.shape[:2], dtype=torch.bool)
        is_padding[:num_tiles, : self._patches] = False
        order = is_padding.flatten().argsort(stable=True)
        real_first, rows = self._tiles.flatten(0, 1)[order], self._tiles.flatten(0, 1)[None]
        mask = _prepare_aspect_ratio_attention_mask(
            (torch.arange(self.max_tiles) < num_tiles)[None].float(), self._patches, self._tiles.shape[1], self._dtype
        )
        ours, image = [VisionLayer(vision_layer_parts(layer)) for layer in self._layers], self._image(num_tiles)
        calls: list[Callable[[], Tensor]] = [
            lambda: reduce(lambda hidden, layer: layer(hidden, image), ours, real_first),
            lambda: reduce(lambda hidden, layer: layer(hidden, attention_mask=mask), self._layers, rows),
        ]
        difference = self._checked_difference(calls[0](), calls[1]()[0, order])
        seconds = _in_turn(calls, runs)
        ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
        our_seconds, their_seconds = map(statistics.median, seconds)
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "layers": len(ours),
            "seconds": round(our_seconds, 3),
            "transformers_seconds": round(their_seconds, 3),
            "speedup": round(statistics.median(ratios), 2),
            "interval": interval(ratios),
            "difference": difference,
        }

    def together(self, counts: Sequence[int], runs: int) -> list[dict[str, Any]]:
        """Images of one tile; seconds are of each image in a pass of so many, the fastest of the runs."""
        num_rows: int = self.geometry["rows"]
        layer, image = _Together(vision_layer_parts(self._layers[0])), self._image(1)
        layer.num_rows = num_rows
        rows = torch.randn(max(counts) * num_rows, self._tiles.shape[2])
        calls = [lambda count=count: layer(rows[: count * num_rows], image) for count in counts]
        # The same product for every count, the one that a single image gets: it is not what is compared.
        has_own_product = num_rows <= Projection(rows).most_rows(rows.dtype)
        with patch.object(Projection, "most_rows", return_value=inf if has_own_product else 0):
            alone = torch.cat([layer(of_image, image) for of_image in rows.split(num_rows)])
            difference = self._checked_difference(calls[-1](), alone)
            seconds = [min(samples) / count for samples, count in zip(_in_turn(calls, runs), counts, strict=True)]
        return [
            {
                "images": count,
                "seconds_per_image": round(each, 6),
                "speedup": round(seconds[0] / each, 2),
                "difference": difference,
            }
            for count, each in zip(counts, seconds, strict=True)
        ]

    def _checked_difference(self, found: Tensor, expected: Tensor) -> float:
        difference = (found.float() - expected.float()).square().mean().sqrt().item()
        assert difference <= _MOST_DIFFERENCE[self._dtype], difference
        return difference

    def _image(self, num_tiles: int) -> ImageRows:
        return ImageRows(num_tiles * self._patches, VisionObserver(frozenset(), num_tiles, self._patches, 1))


def _in_turn(calls: Sequence[Callable[[], Tensor]], runs: int) -> list[list[float]]:
    """Seconds of each run of each call."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, seconds in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return samples


if __name__ == "__main__":
    main()
