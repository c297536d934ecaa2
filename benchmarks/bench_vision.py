"""Times layers of the vision encoder against transformers', at the geometry of Llama-3.2-Vision 11B.

    python -m benchmarks.bench_vision [--runs 3] [--threads 1] [--out FILE]

One image of one tile and one of four, in float32 and in bfloat16; the ratio has the 95 % interval of the median of the
pairs that were timed in turn. The weights are random. Outputs are compared first.
"""

from functools import reduce
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor
from transformers import MllamaConfig
from transformers.models.mllama.modeling_mllama import _prepare_aspect_ratio_attention_mask

from benchmarks.measure import beside
from benchmarks.models import draw_weights
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated
from trimserve.model.transformers_mllama import vision_parts
from trimserve.model.vision import ImageRows, VisionLayer
from trimserve.model.vision_observer import VisionObserver
from trimserve.model.weights import allocated_model

__all__ = ["main", "table"]

_NO_TEXT: Final = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "cross_attention_layers": []}
"""A decoder that is not run."""
_NUM_LAYERS: Final = 4
_ROW_ALIGNMENT: Final = 8
_MOST_TILES: Final = 4
_MOST_DIFFERENCE: Final = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Root mean square over outputs whose own is several; of bfloat16 what both sides' rounding comes to."""


def _encoder(dtype: torch.dtype) -> Any:
    """The model of transformers, of whose encoder the last layers are run."""
    layers = {"num_hidden_layers": 1, "num_global_layers": _NUM_LAYERS, "intermediate_layers_indices": [0]}
    vision = {"image_size": 560, "vision_output_dim": 2560, **layers}
    config = MllamaConfig(vision_config=vision, text_config=_NO_TEXT)
    model = allocated_model(config, dtype, torch.device("cpu"))
    draw_weights(model)
    return model


def _beside_transformers(model: Any, num_tiles: int, runs: int) -> dict[str, Any]:
    """One image, our layers and transformers'."""
    theirs_of, parts = model.model.vision_model.global_transformer.layers, vision_parts(model)
    num_rows = parts.num_patches + -parts.num_patches % _ROW_ALIGNMENT
    tiles = torch.randn(_MOST_TILES, num_rows, model.config.vision_config.hidden_size).to(model.dtype)
    is_padding = torch.ones(tiles.shape[:2], dtype=torch.bool)
    is_padding[:num_tiles, : parts.num_patches] = False
    order = is_padding.flatten().argsort(stable=True)
    real_first, rows = tiles.flatten(0, 1)[order], tiles.flatten(0, 1)[None]
    mask = _prepare_aspect_ratio_attention_mask(
        (torch.arange(_MOST_TILES) < num_tiles)[None].float(), parts.num_patches, num_rows, model.dtype
    )
    layers = [VisionLayer(layer) for layer in parts.global_layers]
    image = ImageRows(num_tiles * parts.num_patches, VisionObserver(frozenset(), num_tiles, parts.num_patches, 1))

    def ours() -> Tensor:
        return reduce(lambda hidden, layer: layer(hidden, image), layers, real_first)

    def theirs() -> Tensor:
        return reduce(lambda hidden, layer: layer(hidden, attention_mask=mask), theirs_of, rows)

    difference = (ours().float() - theirs()[0, order].float()).square().mean().sqrt().item()
    assert difference <= _MOST_DIFFERENCE[model.dtype], difference
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(layers),
        **beside(theirs, ours, runs),
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
        "times as fast [95 %]": "{speedup:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]",
    }
    return f"{tabulated(report['results'], columns)}\n\n{origin(report)}"


@torch.inference_mode()
def main() -> None:
    """Compare, time, write."""
    arguments = command_line(__doc__, "vision.json", runs=3)
    torch.manual_seed(0)
    encoders = [_encoder(dtype) for dtype in _MOST_DIFFERENCE]
    results: list[dict[str, Any]] = []
    for encoder, tiles in product(encoders, (1, _MOST_TILES)):
        row = _beside_transformers(encoder, tiles, arguments.runs)
        noted(results, {"threads": arguments.threads, "tiles": tiles, **row})
    finish(arguments, {"results": results})


if __name__ == "__main__":
    main()
