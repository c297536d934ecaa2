"""Times layers of the vision encoder against transformers', at the geometry of Llama-3.2-Vision 11B.

    python -m benchmarks.bench_vision [--runs 3] [--layers 4] [--threads 1 2] [--out FILE]

One image of one tile and one of four, in float32 and in bfloat16; the ratio has the 95 % interval of the median of the
pairs that were timed in turn. The weights are random. Outputs are compared first.
"""

from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor
from transformers import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaVisionEncoderLayer,
    _prepare_aspect_ratio_attention_mask,
)

from benchmarks.measure import medians, seconds_in_pairs, speedup
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated, times
from trimserve.model.transformers_mllama import vision_layer_parts
from trimserve.model.vision import ImageRows, VisionLayer
from trimserve.model.vision_observer import VisionObserver
from trimserve.model.weights import fuse

__all__ = ["main", "table"]

_ROW_ALIGNMENT: Final = 8
_PATCHES: Final = (560 // 14) ** 2 + 1
_MOST_DIFFERENCE: Final = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Root mean square over outputs whose own is several; of bfloat16 what both sides' rounding comes to."""


class _Layers:
    """Layers of the encoder, and the rows of an image."""

    def __init__(self, config: MllamaVisionConfig, dtype: torch.dtype, num_layers: int) -> None:
        """Draw weights that matter: outputs of every linear layer have a standard deviation of about 1."""
        config._attn_implementation = "sdpa"
        self._dtype, self.max_tiles = dtype, config.max_num_tiles
        self._layers = [MllamaVisionEncoderLayer(config, is_gated=True).eval().to(dtype) for _ in range(num_layers)]
        for layer in self._layers:
            fuse(vision_layer_parts(layer).qkv, torch.device("cpu"))
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        rows = _PATCHES + -_PATCHES % _ROW_ALIGNMENT
        self._tiles = torch.randn(self.max_tiles, rows, config.hidden_size).to(dtype)

    def beside_transformers(self, num_tiles: int, runs: int) -> dict[str, Any]:
        """One image, our layers and transformers'."""
        is_padding = torch.ones(self._tiles.shape[:2], dtype=torch.bool)
        is_padding[:num_tiles, :_PATCHES] = False
        order = is_padding.flatten().argsort(stable=True)
        real_first, rows = self._tiles.flatten(0, 1)[order], self._tiles.flatten(0, 1)[None]
        mask = _prepare_aspect_ratio_attention_mask(
            (torch.arange(self.max_tiles) < num_tiles)[None].float(), _PATCHES, self._tiles.shape[1], self._dtype
        )
        layers = [VisionLayer(vision_layer_parts(layer)) for layer in self._layers]
        image = ImageRows(num_tiles * _PATCHES, VisionObserver(frozenset(), num_tiles, _PATCHES, 1))

        def ours() -> Tensor:
            return reduce(lambda hidden, layer: layer(hidden, image), layers, real_first)

        def theirs() -> Tensor:
            return reduce(lambda hidden, layer: layer(hidden, attention_mask=mask), self._layers, rows)

        difference = (ours().float() - theirs()[0, order].float()).square().mean().sqrt().item()
        assert difference <= _MOST_DIFFERENCE[self._dtype], difference
        pairs = seconds_in_pairs(theirs, ours, runs)
        their_seconds, seconds = medians(pairs)
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "layers": len(layers),
            "seconds": seconds,
            "transformers_seconds": their_seconds,
            **speedup(pairs),
            "difference": difference,
        }


def table(report: dict[str, Any]) -> str:
    """Seconds of the vision encoder's layers beside transformers', as Markdown."""
    columns: Columns = {
        "threads": "{threads}",
        "tiles": "{tiles}",
        "dtype": "{dtype}",
        "trimserve, s": "{seconds:.2f}",
        "transformers, s": "{transformers_seconds:.2f}",
        "times as fast [95 %]": times,
    }
    return f"{tabulated(report['results'], columns)}\n\n{origin(report)}"


@torch.inference_mode()
def main() -> None:
    """Compare, time, write."""
    arguments = command_line(__doc__, "vision.json", runs=3, layers=4, threads=[1, 2])
    torch.manual_seed(0)
    config = MllamaVisionConfig(image_size=560)
    compared = [_Layers(config, dtype, arguments.layers) for dtype in _MOST_DIFFERENCE]
    results: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for layers in compared:
            for tiles in (1, layers.max_tiles):
                row = layers.beside_transformers(tiles, arguments.runs)
                noted(results, {"threads": threads, "tiles": tiles, **row})
    finish(arguments, {"results": results})


if __name__ == "__main__":
    main()
