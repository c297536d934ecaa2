"""Times vision encoder, prefill and decode steps beside transformers, and decode steps beside their floor.

    python -m benchmarks.bench_generate [--bench-model DIR] [--out FILE] [--quick]

The geometry is `bench`'s (`models.py`). A question about an image of four tiles is asked untrimmed (`off`) and trimmed
(`default`), one about an image of one tile trimmed (`one_tile`); images are encoded and prompts read one at a time, as
the engine does. Every sequence of a batch holds keys and values in pages of its own. transformers pads each image to a
full canvas; its step has the cache that grows, and sdpa. The floor of a step is the larger of the bytes of weights,
keys and values over the read bandwidth and of the products over the rate of products (`floor.py`); a step and a read of
much memory take turns.

Logits are compared first.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from benchmarks.floor import Floor, StepShape
from benchmarks.measure import stream, time_calls, time_in_turns
from benchmarks.models import BENCH_MODEL, bench_model, max_kept_fraction
from benchmarks.ours import QUESTION, SETTINGS, Asked, Ours
from benchmarks.report import command_line, finish, markdown, noted, origin, precision
from benchmarks.rival import Rival
from tests.model.peer import Peer
from trimserve.config import Dtype, Quantize
from trimserve.model.loading import embedded_model_folder

__all__ = ["main", "phases", "table"]

_LOGITS = 1e-2
"""By so much logits of a standard deviation of about 3 may differ in float32."""

Row = dict[str, Any]


_VARIANTS: Final[tuple[tuple[Dtype, Quantize], ...]] = (
    ("float32", "none"),
    ("bfloat16", "none"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
)
"""How our model is stored."""
_SETTINGS: Final = {"off": "4 tiles, untrimmed", "default": "4 tiles", "one_tile": "1 tile"}


class _Plan(NamedTuple):
    """How much is measured."""

    folder: Path
    cap: float | None
    """Of the features that trimmed settings keep."""
    batches: Sequence[int] = (1, 4, 8, 16, 32)
    variants: Sequence[tuple[Dtype, Quantize]] = _VARIANTS
    seconds: float = 1.0
    """Of every figure."""


def phases(asked: Asked | Rival, batches: Sequence[int], timed: Callable[[Callable[[], Any]], Any]) -> Iterator[Row]:
    """What `timed` finds of a prompt's image, of reading it, and of a decode step for each batch."""
    yield {"phase": "vision", "batch": 1, "ms": timed(asked.encode)}
    yield {"phase": "prefill", "batch": 1, "ms": timed(asked.prefill)}
    for batch in batches:
        yield {"phase": "decode", "batch": batch, "ms": timed(asked.step(batch))}


@torch.inference_mode()
def _ours(plan: _Plan, dtype: Dtype, quantize: Quantize) -> Iterator[Row]:
    ours = Ours.load(plan.folder, max(plan.batches), dtype=dtype, quantize=quantize)
    shape = StepShape.of_checkpoint(plan.folder, getattr(torch, dtype), quantize)
    for name, setting in SETTINGS.items():
        asked = ours.ask(setting, plan.cap)
        row: Row = {"engine": "trimserve", "dtype": dtype, "quantize": quantize, "setting": name}
        row |= {"prompt_tokens": len(asked.prompt.token_ids), "cross_rows": asked.cross_rows}
        for phase in phases(asked, (), partial(time_calls, seconds=plan.seconds)) if quantize == "none" else ():
            yield row | phase
        read, read_bytes = stream("read")
        for batch in plan.batches:
            taken, reading = time_in_turns([asked.step(batch), read], plan.seconds)
            floor = Floor.of_step(shape, batch, asked.kv_bytes(batch), read_bytes / reading["median"] * 1e3)
            yield row | {"phase": "decode", "batch": batch, "ms": taken, **floor.beside(taken["median"])}
        asked.release()


@torch.inference_mode()
def _theirs(plan: _Plan, peer: Peer, dtype: Dtype) -> Iterator[Row]:
    peer.model.to(getattr(torch, dtype))
    for name in ("off", "one_tile"):  # `default` has the prompt of `off`
        rival = _rival(peer, name)
        row = {"engine": "transformers", "dtype": dtype, "quantize": "none", "setting": name}
        for phase in phases(rival, plan.batches, partial(time_calls, seconds=plan.seconds)):
            yield row | phase


def _rival(peer: Peer, name: str) -> Rival:
    return Rival.asked(peer, QUESTION, SETTINGS[name].picture(peer.model.config.vision_config.image_size))


@torch.inference_mode()
def _compare(plan: _Plan, peer: Peer) -> Row:
    """Both models' logits of the untrimmed prompt, in float32; `AssertionError` if they differ."""
    asked = Ours.load(plan.folder, 1, dtype="float32").ask(SETTINGS["off"])
    rival = _rival(peer, "off")
    difference = float((asked.logits - rival.logits).abs().max())
    assert rival.token_ids == list(asked.prompt.token_ids)
    assert difference < _LOGITS
    return {"largest_logit_difference": round(difference, 6), "logit_std": round(float(rival.logits.std()), 3)}


def _rows(plan: _Plan, peer: Peer) -> Iterator[Row]:
    for variant in plan.variants:
        yield from _ours(plan, *variant)
    for dtype in dict.fromkeys(dtype for dtype, _ in plan.variants):
        yield from _theirs(plan, peer, dtype)


def table(report: dict[str, Any]) -> str:
    """Milliseconds of a decode step by batch, and of vision and prefill, as Markdown."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in report["rows"]:
        if row["engine"] in ("trimserve", "transformers"):  # older reports have a third
            names = f"{row['engine']}, {precision(row)}", _SETTINGS[row["setting"]]
            lines.setdefault(names, {})[_column(row)] = _cell(row)
    steps = list(dict.fromkeys(_column(row) for row in report["rows"] if row["phase"] == "decode"))
    parts = {"decode step, ms (times its floor)": steps, "ms": ["vision", "prefill"]}
    return "\n\n".join([*(_part(head, lines, columns) for head, columns in parts.items()), origin(report)])


def _column(row: Row) -> str:
    return f"batch {row['batch']}" if row["phase"] == "decode" else str(row["phase"])


def _cell(row: Row) -> str:
    floor = f" ({row['times_floor']:.2f})" if "times_floor" in row else ""
    return f"{row['ms']['median']:,.{1 if row['phase'] == 'decode' else 0}f}{floor}"


def _part(head: str, lines: dict[tuple[str, str], dict[str, str]], columns: Sequence[str]) -> str:
    rows = [
        [*names, *(cells.get(column, "") for column in columns)]
        for names, cells in lines.items()
        if cells.keys() & {*columns}
    ]
    return markdown([head, "request", *columns], rows, words=2)


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "generate/report.json", bench_model=BENCH_MODEL, quick=False)
    if arguments.quick:
        folder, few = embedded_model_folder(), _VARIANTS[:3]
        plan = _Plan(folder, None, batches=(1, 2), variants=few, seconds=0.01)
    else:
        plan = _Plan(bench_model(arguments.bench_model), max_kept_fraction())
    peer = Peer(plan.folder)
    model = "embedded" if arguments.quick else "bench"
    figures = {"model": model, "max_kept_fraction": plan.cap, **_compare(plan, peer)}
    rows: list[Row] = []
    for row in _rows(plan, peer):
        noted(rows, row)
    finish(arguments, {**figures, "rows": rows})


if __name__ == "__main__":
    main()
