"""Times a self-attention layer that reads a long prompt against transformers', at the 11B model's geometry, on a CPU.

    python -m benchmarks.bench_prefill [--runs 5] [--rows 2048] [--out FILE]

In bfloat16 and in float32, with the same random weights; transformers' layer has sdpa. Both sides take turns, and must
agree. Seconds are processor time of one thread, so that other work on the machine changes them little.
"""

import time
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.measure import beside
from benchmarks.models import drawn_model
from benchmarks.report import command_line, finish, noted
from trimserve import ops
from trimserve.model.attention import causal_attention
from trimserve.model.decoder_layers import SelfLayer
from trimserve.model.ranks import ALONE
from trimserve.model.rotary import RotaryAngles
from trimserve.model.transformers_mllama import SelfLayerParts, decoder_parts

__all__ = ["main"]

_CLOSE: Final = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""By which the two layers may differ at most, of values up to about 5."""
_NO_TOKENS: Final = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ONE_LAYER: Final = {"num_hidden_layers": 1, "cross_attention_layers": [], **_NO_TOKENS}


def _layer(dtype: torch.dtype, num_rows: int, runs: int) -> dict[str, Any]:
    model: Any = drawn_model(dtype, text_config=_ONE_LAYER)
    text, decoder = model.model.language_model, decoder_parts(model)
    [parts] = decoder.layers
    assert isinstance(parts, SelfLayerParts)
    layer = SelfLayer(parts, 0, text.layers[0].self_attn.head_dim, ALONE)
    num_turned = text.config.num_attention_heads + text.config.num_key_value_heads
    rows = torch.randn(num_rows, text.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotation = RotaryAngles(decoder.rotary).at(list(range(num_rows)))
    embeddings = text.rotary_emb(rows, torch.arange(num_rows)[None])

    def ours() -> Tensor:
        """As the decoder has it."""
        heads = layer.project(rows, None)
        ops.rotate(heads[:, :num_turned], rotation.cosines, rotation.sines)
        return layer.finish(rows, causal_attention(*layer.split(heads), layer.scale), None)

    def theirs() -> Tensor:
        result: Tensor = text.layers[0](rows[None], attention_mask=None, position_embeddings=embeddings)[0]
        return result

    difference = (ours() - theirs()).abs().max().item()
    assert difference < _CLOSE[dtype], f"the layers differ by {difference} in {dtype}"
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "num_rows": num_rows,
        **beside(theirs, ours, runs, time.thread_time),
        "difference": difference,
    }


@torch.inference_mode()
def main() -> None:
    """Compare, time, write."""
    arguments = command_line(__doc__, "prefill.json", runs=5, rows=2048)
    layers: list[dict[str, Any]] = []
    for dtype in _CLOSE:
        noted(layers, _layer(dtype, arguments.rows, arguments.runs))
    finish(arguments, {"layer": layers})


if __name__ == "__main__":
    main()
