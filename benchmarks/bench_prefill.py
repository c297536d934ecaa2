"""What the rows of prompts cost on a CPU: a layer of a long prompt, and several small prompts in one pass.

    python -m benchmarks.bench_prefill [--bench-model DIR] [--out FILE] [--quick]

A self-attention layer of Llama-3.2-Vision 11B's geometry takes 2,048 rows, with our ops as the decoder uses them and
with torch's. Then 1 to 8 prompts of 20 tokens are read, one by one and together, by the embedded model and `bench`.
Both sides take turns, and must agree. Seconds are processor time of one thread, so that other work on the machine
changes them little.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import in_pairs, medians, speedup
from benchmarks.models import BENCH_MODEL, bench_model
from benchmarks.report import command_line, finish, noted
from tests.tolerances import LOGITS
from trimserve import ops
from trimserve.api.prompt import TokenPrompt
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnPages
from trimserve.model.attention import causal_attention
from trimserve.model.interruptible import run_through
from trimserve.model.loading import embedded_model_folder, load_model
from trimserve.model.prefilled import ToPrefill
from trimserve.model.projection import Projection
from trimserve.trimming.plan import TrimPlan

__all__ = ["main"]

_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM = 4096, 14336, 32, 8, 128
_SCALE: Final = _HEAD_DIM**-0.5
_EPSILON: Final = 1e-5
_PROMPT_TOKENS: Final = 20
_NUM_PROMPTS: Final = (1, 2, 4, 8)
_CLOSE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""By which the two layers may differ at most, of values up to about 5."""


class _Layer:
    """Weights of a self-attention layer, and rows at its beginning."""

    def __init__(self, dtype: torch.dtype, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            drawn: Tensor = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
            return drawn.to(dtype)

        self.qkv = draw((_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, _HIDDEN)
        self.output, self.gate_up = draw(_HIDDEN, _HIDDEN), draw(2 * _INNER, _HIDDEN)
        self.down, self.norm = draw(_HIDDEN, _INNER), torch.ones(_HIDDEN, dtype=dtype)
        self.rows = draw(num_rows, _HIDDEN) * _HIDDEN**0.5
        angles = torch.arange(num_rows)[:, None] * 500000.0 ** (-torch.arange(0, 1, 2 / _HEAD_DIM))
        self.cosines, self.sines = angles.cos(), angles.sin()

    def ours(self) -> Tensor:
        """As `decoder_layers.py` has it."""
        normed = ops.rms_norm(self.rows, self.norm, _EPSILON)
        heads = Projection(self.qkv)(normed).view(len(normed), -1, _HEAD_DIM)
        ops.rotate(heads[:, : _HEADS + _KV_HEADS], self.cosines, self.sines)
        q, k, v = heads.split([_HEADS, _KV_HEADS, _KV_HEADS], dim=1)
        attended = Projection(self.output).added_to(self.rows, causal_attention(q, k, v, _SCALE))
        inner = ops.silu_gate(Projection(self.gate_up)(ops.rms_norm(attended, self.norm, _EPSILON)))
        return Projection(self.down).added_to(attended, inner)

    def theirs(self) -> Tensor:
        """The same of torch's operators, as transformers composes them."""
        normed = F.rms_norm(self.rows, (_HIDDEN,), self.norm, _EPSILON)
        heads = F.linear(normed, self.qkv).view(len(normed), -1, _HEAD_DIM)
        q, k, v = heads.split([_HEADS, _KV_HEADS, _KV_HEADS], dim=1)
        q, k, v = (part.transpose(0, 1)[None] for part in (self._rotated(q), self._rotated(k), v))
        looked = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        attended = self.rows + F.linear(looked.flatten(1), self.output)
        gate, up = F.linear(F.rms_norm(attended, (_HIDDEN,), self.norm, _EPSILON), self.gate_up).chunk(2, dim=1)
        result: Tensor = attended + F.linear(F.silu(gate) * up, self.down)
        return result

    def _rotated(self, heads: Tensor) -> Tensor:
        cosines, sines = (part.repeat(1, 2)[:, None].to(heads.dtype) for part in (self.cosines, self.sines))
        first, second = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat([-second, first], dim=-1) * sines


def _layer(dtype: torch.dtype, num_rows: int, num_pairs: int) -> dict[str, Any]:
    layer = _Layer(dtype, num_rows)
    difference = (layer.ours() - layer.theirs()).abs().max().item()
    if not difference < _CLOSE[dtype]:
        raise SystemExit(f"the layers differ by {difference} in {dtype}")
    row = {"dtype": str(dtype).removeprefix("torch."), "num_rows": num_rows}
    return row | _compared(layer.ours, layer.theirs, num_pairs)


def _prompts(folder: Path, num_prompts: int, num_pairs: int) -> dict[str, Any]:
    model = load_model(ModelConfig(model=str(folder)), EngineConfig())
    pool, trim = OwnPages(model.info, 2**28), TrimPlan.of(TrimRequest(enabled=False))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 600, (num_prompts, _PROMPT_TOKENS), generator=generator).tolist()
    wanted = [
        ToPrefill(model.prepare(TokenPrompt(tuple(each), ())), [], trim, pool.key_values(_PROMPT_TOKENS))
        for each in ids
    ]

    def read(groups: Sequence[Sequence[ToPrefill]]) -> Tensor:
        return torch.stack([each.logits for group in groups for each in run_through(model.prefill_together(group))])

    together, one_by_one = partial(read, [wanted]), partial(read, [[each] for each in wanted])
    torch.testing.assert_close(together(), one_by_one(), atol=LOGITS, rtol=0)
    row = {"model": model.info.model_id, "num_prompts": num_prompts, "num_tokens": _PROMPT_TOKENS}
    return row | _compared(together, one_by_one, num_pairs)


def _processor_seconds(call: Callable[[], Tensor]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _compared(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], num_pairs: int) -> dict[str, Any]:
    """Processor time of both, and how many times as long the other takes."""
    pairs = in_pairs(lambda _: _processor_seconds(theirs), lambda _: _processor_seconds(ours), num_pairs)
    other_seconds, seconds = medians(pairs)
    return {"seconds": seconds, "other_seconds": other_seconds, **speedup(pairs)}


@torch.inference_mode()
def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "prefill.json", bench_model=BENCH_MODEL, quick=False)
    num_rows, num_pairs, num_turns = (64, 2, 3) if arguments.quick else (2048, 5, 30)
    layer: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        noted(layer, _layer(dtype, num_rows, num_pairs))
    folders = [embedded_model_folder(), *([] if arguments.quick else [bench_model(arguments.bench_model)])]
    for folder, num_prompts in product(folders, _NUM_PROMPTS):
        noted(prompts, _prompts(folder, num_prompts, num_turns))
    finish(arguments, {"layer": layer, "prompts": prompts})


if __name__ == "__main__":
    main()
